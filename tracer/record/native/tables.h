// The tables: what records name by number and what is told once, each written the first time it is seen.
#pragma once

#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "trace_file.h"

namespace truedag {

// Length-prefixed entries of the tables stream: kind, id, bytes, then the payload, padded to 8.
class TableWriter {
 public:
  explicit TableWriter(TraceFile& file) : stream_(file, kTables, 0, 0) {}

  void write(TableKind kind, uint32_t id, const std::string& payload) {
    std::lock_guard<std::mutex> guard(mutex_);
    const uint32_t head[4] = {kind, id, static_cast<uint32_t>(payload.size()), 0};
    const size_t padded = (payload.size() + 7) & ~size_t{7};
    char* place = stream_.reserve(sizeof(head) + padded);
    std::memcpy(place, head, sizeof(head));
    std::memcpy(place + sizeof(head), payload.data(), payload.size());
    stream_.commit(sizeof(head) + padded);
  }

 private:
  std::mutex mutex_;
  Stream stream_;
};

inline uint64_t mix(uint64_t hash, uint64_t value) {
  hash ^= value;
  hash *= 0x9e3779b97f4a7c15ULL;
  return hash ^ (hash >> 29);
}

inline std::string json_string(std::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      char escaped[8];
      std::snprintf(escaped, sizeof(escaped), "\\u%04x", c);
      out += escaped;
    } else {
      out += c;
    }
  }
  return out + "\"";
}

struct GroupEntry {
  uint32_t id = 0;
  std::string name;
  int64_t num_collectives = 0;
  int64_t num_p2p = 0;
};

class GroupTable {
 public:
  using WeakGroup = c10::weak_intrusive_ptr<c10d::ProcessGroup>;

  // The group's entry, and this operation's place in the recorder's own count.
  GroupEntry* find(const c10::intrusive_ptr<c10d::ProcessGroup>& held, TableWriter& tables) {
    c10d::ProcessGroup& group = *held;
    const std::string& name = group.getGroupName();
    std::string key = name + "@" + std::to_string(reinterpret_cast<uint64_t>(&group));
    auto known = entries_.find(key);
    if (known == entries_.end()) {
      auto entry = std::make_unique<GroupEntry>();
      entry->id = static_cast<uint32_t>(entries_.size()) + 1;
      entry->name = name;
      std::string ranks;
      try {
        for (const auto rank : group.getBackend(group.getBackendType())->getBackendOptions()->global_ranks_in_group) {
          if (!ranks.empty()) ranks += ",";
          ranks += std::to_string(rank);
        }
      } catch (const std::exception&) {
        ranks.clear();  // this backend keeps no list; the Python side of the recorder knows it by name
      }
      tables.write(kGroup, entry->id,
                   "{\"name\":" + json_string(name) + ",\"description\":" + json_string(group.getGroupDesc()) +
                       ",\"rank\":" + std::to_string(group.getRank()) + ",\"size\":" + std::to_string(group.getSize()) +
                       ",\"backend\":" + json_string(group.getBackendName()) + ",\"ranks\":[" + ranks + "]}");
      known = entries_.emplace(key, Known{WeakGroup(held), std::move(entry)}).first;
    }
    return known->second.entry.get();
  }

  std::mutex mutex;  // held by the caller around find and the counting

 private:
  struct Known {
    WeakGroup group;  // its address is not given out again while we go by it
    std::unique_ptr<GroupEntry> entry;
  };

  std::unordered_map<std::string, Known> entries_;
};

}  // namespace truedag
