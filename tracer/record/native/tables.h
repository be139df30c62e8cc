// What records name by number: operators, layouts, storages, process groups, labels. Each is written to the trace's
// tables the first time it is seen; a thread's own cache answers from then on without a lock.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "trace_file.h"

namespace truedag {

enum class OpClass : uint8_t {
  kTransparent,  // what it calls are the operators: CompositeImplicitAutograd kernels, functional collectives
  kLeaf,         // an operator; what it calls inside is its own business
  kComm,         // an operator of c10d with a process group
  kFunction,     // a named function that is no dispatcher operator (autograd functions)
  kEngine,       // autograd's engine around one backward node
};

struct OpEntry {
  std::string name;
  uint32_t id = 0;
  OpClass kind = OpClass::kTransparent;
  bool stable = false;  // the name's address belongs to a schema and is never used again
  int group_arg = -1;
  int peer_arg = -1;
  int tag_arg = -1;
  int reduce_arg = -1;
  int async_arg = -1;
  bool p2p = false;
};

// Length-prefixed entries of the tables stream: kind, id, bytes, then the payload, padded to 8.
class TableWriter {
 public:
  explicit TableWriter(TraceFile& file) : stream_(file, kTables, 0, 0, size_t{64} << 10) {}

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

// Operators, by the address of their schema's name.
class OpTable {
 public:
  OpEntry* find(const at::RecordFunction& fn, TableWriter& tables, std::string& error) {
    const auto operator_name = fn.operator_name();
    std::string key(fn.name());
    if (operator_name.has_value()) key += "." + operator_name->overload_name;
    key += static_cast<char>('0' + static_cast<int>(fn.scope()));
    std::lock_guard<std::mutex> guard(mutex_);
    auto& slot = entries_[key];
    if (slot == nullptr) slot = make(fn, operator_name, tables, error);
    return slot.get();
  }

 private:
  std::unique_ptr<OpEntry> make(const at::RecordFunction& fn, const std::optional<c10::OperatorName>& operator_name,
                                TableWriter& tables, std::string& error) {
    auto entry = std::make_unique<OpEntry>();
    entry->name = fn.name();
    entry->id = static_cast<uint32_t>(entries_.size());
    std::string overload;
    std::string schema_text;
    bool inplace_view = false;
    if (operator_name.has_value()) {
      entry->stable = true;
      overload = operator_name->overload_name;
      const auto handle = c10::Dispatcher::singleton().findOp(*operator_name);
      if (handle.has_value() && handle->hasSchema()) {
        const auto& schema = handle->schema();
        std::ostringstream text;
        text << schema;
        schema_text = text.str();
        inplace_view = handle->hasTag(at::Tag::inplace_view);
        entry->kind = classify(*handle, *operator_name, *entry);
      }
    } else if (entry->name.rfind("autograd::engine::", 0) == 0) {
      entry->kind = OpClass::kEngine;
    } else {
      entry->kind = OpClass::kFunction;
    }
    tables.write(kOp, entry->id,
                 "{\"name\":" + json_string(entry->name) + ",\"overload\":" + json_string(overload) + ",\"schema\":" +
                     json_string(schema_text) + ",\"inplace_view\":" + (inplace_view ? "true" : "false") + "}",
                 error);
    return entry;
  }

  static OpClass classify(const c10::OperatorHandle& handle, const c10::OperatorName& name, OpEntry& entry) {
    const auto starts = [&](const char* prefix) { return name.name.rfind(prefix, 0) == 0; };
    if (starts("profiler::") || starts("_c10d_functional::") || starts("c10d_functional::")) {
      return OpClass::kTransparent;
    }
    if (starts("c10d::")) {
      const auto& arguments = handle.schema().arguments();
      for (int i = 0; i < static_cast<int>(arguments.size()); ++i) {
        const auto& argument = arguments[i].name();
        if (argument == "process_group") entry.group_arg = i;
        if (argument == "root_rank" || argument == "src" || argument == "dst") entry.peer_arg = i;
        if (argument == "tag") entry.tag_arg = i;
        if (argument == "reduce_op") entry.reduce_arg = i;
        if (argument == "async_op") entry.async_arg = i;
      }
      entry.p2p = starts("c10d::send") || starts("c10d::recv");
      if (entry.group_arg >= 0) return OpClass::kComm;
    }
    return handle.hasKernelForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd) ? OpClass::kTransparent
                                                                                       : OpClass::kLeaf;
  }

  std::mutex mutex_;
  std::unordered_map<std::string, std::unique_ptr<OpEntry>> entries_;
};

// Layouts: dtype, device, sizes, strides in elements. Payload: dtype, device type, itemsize, ndim as int32; then int64s.
struct LayoutEntry {
  uint32_t id;
  int32_t dtype;
  int32_t device;
  std::vector<int64_t> dims;  // sizes, then strides

  bool same(int32_t dtype_, int32_t device_, c10::IntArrayRef sizes, c10::IntArrayRef strides) const {
    const size_t n = sizes.size();
    return dtype == dtype_ && device == device_ && dims.size() == 2 * n &&
           std::memcmp(dims.data(), sizes.data(), n * sizeof(int64_t)) == 0 &&
           std::memcmp(dims.data() + n, strides.data(), n * sizeof(int64_t)) == 0;
  }
};

inline uint64_t mix(uint64_t hash, uint64_t value) {
  hash ^= value;
  hash *= 0x9e3779b97f4a7c15ULL;
  return hash ^ (hash >> 29);
}

inline uint64_t hash_layout(int32_t dtype, int32_t device, c10::IntArrayRef sizes, c10::IntArrayRef strides) {
  uint64_t hash = mix(static_cast<uint64_t>(dtype) << 8 | static_cast<uint64_t>(device), sizes.size());
  for (const auto size : sizes) hash = mix(hash, static_cast<uint64_t>(size));
  for (const auto stride : strides) hash = mix(hash, static_cast<uint64_t>(stride));
  return hash;
}

class LayoutTable {
 public:
  const LayoutEntry* find(uint64_t hash, int32_t dtype, int32_t device, int32_t itemsize, c10::IntArrayRef sizes,
                          c10::IntArrayRef strides, TableWriter& tables, std::string& error) {
    std::lock_guard<std::mutex> guard(mutex_);
    auto& bucket = entries_[hash];
    for (const auto& entry : bucket) {
      if (entry->same(dtype, device, sizes, strides)) return entry.get();
    }
    auto entry = std::make_unique<LayoutEntry>();
    entry->id = ++count_;
    entry->dtype = dtype;
    entry->device = device;
    entry->dims.assign(sizes.begin(), sizes.end());
    entry->dims.insert(entry->dims.end(), strides.begin(), strides.end());
    const int32_t head[4] = {dtype, device, itemsize, static_cast<int32_t>(sizes.size())};
    std::string payload(reinterpret_cast<const char*>(head), sizeof(head));
    payload.append(reinterpret_cast<const char*>(entry->dims.data()), entry->dims.size() * sizeof(int64_t));
    tables.write(kLayout, entry->id, payload, error);
    bucket.push_back(std::move(entry));
    return bucket.back().get();
  }

 private:
  std::mutex mutex_;
  uint32_t count_ = 0;
  std::unordered_map<uint64_t, std::vector<std::unique_ptr<LayoutEntry>>> entries_;
};

// Storages, by StorageImpl, data address and size: the same three again are the same id, which the merge splits where
// a fresh output shows that the memory was given out anew. Payload: three uint64.
class StorageTable {
 public:
  ~StorageTable() {
    for (auto* impl : held_) c10::raw::weak_intrusive_ptr::decref(impl);
  }

  // `is_input`: it was there before any operator was seen to make it. Such a storage's address is kept from being
  // given out again, since nothing would show that another storage has come to lie there.
  uint32_t find(c10::StorageImpl* impl, const void* data, uint64_t bytes, bool is_input, TableWriter& tables,
                std::string& error) {
    std::lock_guard<std::mutex> guard(mutex_);
    auto& bucket = entries_[mix(mix(reinterpret_cast<uint64_t>(impl), reinterpret_cast<uint64_t>(data)), bytes)];
    for (const auto& entry : bucket) {
      if (entry.impl == impl && entry.data == data && entry.bytes == bytes) return entry.id;
    }
    bucket.push_back({impl, data, bytes, ++count_});
    if (is_input) {
      c10::raw::weak_intrusive_ptr::incref(impl);
      held_.push_back(impl);
    }
    const uint64_t words[3] = {reinterpret_cast<uint64_t>(impl), reinterpret_cast<uint64_t>(data), bytes};
    tables.write(kStorage, count_, std::string(reinterpret_cast<const char*>(words), sizeof(words)), error);
    return count_;
  }

 private:
  struct Entry {
    const void* impl;
    const void* data;
    uint64_t bytes;
    uint32_t id;
  };
  std::mutex mutex_;
  uint32_t count_ = 0;
  std::unordered_map<uint64_t, std::vector<Entry>> entries_;
  std::vector<c10::StorageImpl*> held_;
};

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
