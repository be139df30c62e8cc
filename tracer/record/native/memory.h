// Memory: layouts, storages, and when memory was given back.
#pragma once

#include <c10/core/CPUAllocator.h>
#include <c10/core/StorageImpl.h>
#include <c10/core/TensorImpl.h>

#include <algorithm>
#include <array>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "tables.h"

namespace truedag {

// Layouts: dtype, device, sizes, strides in elements. Payload: dtype, device type, itemsize, ndim as int32; then int64s.
struct LayoutEntry {
  static constexpr size_t kNear = 10;

  uint32_t id = 0;
  int32_t dtype = 0;
  int32_t device = 0;
  uint32_t ndim = 0;
  std::array<int64_t, kNear> near{};  // sizes, then strides, of up to five dimensions
  std::vector<int64_t> far;           // of more

  const int64_t* dims() const { return 2 * ndim <= kNear ? near.data() : far.data(); }

  bool same(int32_t dtype_, int32_t device_, c10::IntArrayRef sizes, c10::IntArrayRef strides) const {
    if (dtype != dtype_ || device != device_ || ndim != sizes.size()) return false;
    const int64_t* known = dims();
    int64_t difference = 0;
    for (size_t i = 0; i < ndim; ++i) difference |= (known[i] ^ sizes[i]) | (known[ndim + i] ^ strides[i]);
    return difference == 0;
  }
};

inline uint64_t hash_layout(int32_t dtype, int32_t device, c10::IntArrayRef sizes, c10::IntArrayRef strides) {
  uint64_t hash = mix(static_cast<uint64_t>(dtype) << 8 | static_cast<uint64_t>(device), sizes.size());
  for (const auto size : sizes) hash = mix(hash, static_cast<uint64_t>(size));
  for (const auto stride : strides) hash = mix(hash, static_cast<uint64_t>(stride));
  return hash;
}

class LayoutTable {
 public:
  [[gnu::cold]] const LayoutEntry* find(uint64_t hash, int32_t dtype, int32_t device, int32_t itemsize, c10::IntArrayRef sizes,
                          c10::IntArrayRef strides, TableWriter& tables) {
    std::lock_guard<std::mutex> guard(mutex_);
    auto& bucket = entries_[hash];
    for (const auto& entry : bucket) {
      if (entry->same(dtype, device, sizes, strides)) return entry.get();
    }
    auto entry = std::make_unique<LayoutEntry>();
    entry->id = count_ + 1;
    entry->dtype = dtype;
    entry->device = device;
    entry->ndim = static_cast<uint32_t>(sizes.size());
    if (2 * sizes.size() > LayoutEntry::kNear) entry->far.resize(2 * sizes.size());
    auto* dims = const_cast<int64_t*>(entry->dims());
    std::copy(sizes.begin(), sizes.end(), dims);
    std::copy(strides.begin(), strides.end(), dims + sizes.size());
    const int32_t head[4] = {dtype, device, itemsize, static_cast<int32_t>(sizes.size())};
    std::string payload(reinterpret_cast<const char*>(head), sizeof(head));
    payload.append(reinterpret_cast<const char*>(dims), 2 * sizes.size() * sizeof(int64_t));
    tables.write(kLayout, entry->id, payload);
    ++count_;
    bucket.push_back(std::move(entry));
    return bucket.back().get();
  }

 private:
  std::mutex mutex_;
  uint32_t count_ = 0;
  std::unordered_map<uint64_t, std::vector<std::unique_ptr<LayoutEntry>>> entries_;
};

// Storages, by StorageImpl: with the memory that each had when it was first seen. The same address is the same number,
// which the merge splits where a fresh output shows that it was given out anew.
class StorageTable {
 public:
  explicit StorageTable(TraceFile& file) : stream_(file, kStorages, 0, sizeof(Storage)), slots_(1024) {}

  ~StorageTable() {
    for (auto* impl : held_) c10::raw::weak_intrusive_ptr::decref(impl);
  }

  // `is_input`: it was there before any operator was seen to make it. Such a storage's address is kept from being
  // given out again, since nothing would show that another storage has come to lie there. `is_new` says that it was
  // not known.
  [[gnu::cold]] uint32_t find(c10::StorageImpl* impl, const void* data, uint64_t bytes, bool is_input, bool& is_new) {
    std::lock_guard<std::mutex> guard(mutex_);
    if (2 * stream_.count() >= slots_.size()) grow();
    Slot& slot = slots_[place(impl)];
    is_new = slot.impl == nullptr;
    if (!is_new) return slot.id;
    const Storage storage{reinterpret_cast<uint64_t>(impl), reinterpret_cast<uint64_t>(data), bytes};
    stream_.append(&storage, sizeof(storage));
    if (is_input) {
      c10::raw::weak_intrusive_ptr::incref(impl);
      held_.push_back(impl);
    }
    slot = {impl, static_cast<uint32_t>(stream_.count())};
    return slot.id;
  }

 private:
  struct Slot {
    const c10::StorageImpl* impl = nullptr;
    uint32_t id = 0;
  };

  size_t place(const c10::StorageImpl* impl) const {
    size_t at = mix(reinterpret_cast<uint64_t>(impl), 0) & (slots_.size() - 1);
    while (slots_[at].impl != nullptr && slots_[at].impl != impl) at = (at + 1) & (slots_.size() - 1);
    return at;
  }

  void grow() {
    std::vector<Slot> old(2 * slots_.size());
    old.swap(slots_);
    for (const auto& slot : old) {
      if (slot.impl != nullptr) slots_[place(slot.impl)] = slot;
    }
  }

  std::mutex mutex_;
  Stream stream_;
  std::vector<Slot> slots_;
  std::vector<c10::StorageImpl*> held_;
};

}  // namespace truedag
