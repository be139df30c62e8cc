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

  bool write(TableKind kind, uint32_t id, const std::string& payload, std::string& error) {
    std::lock_guard<std::mutex> guard(mutex_);
    const uint32_t head[4] = {kind, id, static_cast<uint32_t>(payload.size()), 0};
    const size_t padded = (payload.size() + 7) & ~size_t{7};
    char* place = stream_.reserve(sizeof(head) + padded, error);
    if (place == nullptr) return false;
    std::memcpy(place, head, sizeof(head));
    std::memcpy(place + sizeof(head), payload.data(), payload.size());
    stream_.commit(sizeof(head) + padded);
    return true;
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
  ~GroupTable() {
    for (auto* group : held_) c10::raw::weak_intrusive_ptr::decref(group);
  }

  // The group's entry, and this operation's place in the recorder's own count.
  GroupEntry* find(c10d::ProcessGroup& group, TableWriter& tables, std::string& error) {
    const std::string& name = group.getGroupName();
    std::string key = name + "@" + std::to_string(reinterpret_cast<uint64_t>(&group));
    auto& slot = entries_[key];
    if (slot == nullptr) {
      slot = std::make_unique<GroupEntry>();
      slot->id = static_cast<uint32_t>(entries_.size());
      slot->name = name;
      c10::raw::weak_intrusive_ptr::incref(&group);  // its address is not given out again while we go by it
      held_.push_back(&group);
      std::string ranks;
      try {
        for (const auto rank : group.getBackend(group.getBackendType())->getBackendOptions()->global_ranks_in_group) {
          if (!ranks.empty()) ranks += ",";
          ranks += std::to_string(rank);
        }
      } catch (const std::exception&) {
        ranks.clear();  // this backend keeps no list; the Python side of the recorder knows it by name
      }
      tables.write(kGroup, slot->id,
                   "{\"name\":" + json_string(name) + ",\"description\":" + json_string(group.getGroupDesc()) +
                       ",\"rank\":" + std::to_string(group.getRank()) + ",\"size\":" + std::to_string(group.getSize()) +
                       ",\"backend\":" + json_string(group.getBackendName()) + ",\"ranks\":[" + ranks + "]}",
                   error);
    }
    return slot.get();
  }

  std::mutex mutex;  // held by the caller around find and the counting

 private:
  std::unordered_map<std::string, std::unique_ptr<GroupEntry>> entries_;
  std::vector<c10d::ProcessGroup*> held_;
};

}  // namespace truedag
