// Which communication a work, or the tensor of a functional collective, is of: so that waiting can be told of it.
#pragma once

#include <c10/core/StorageImpl.h>
#include <torch/csrc/distributed/c10d/Work.hpp>

#include <array>
#include <mutex>

namespace truedag {

// The last communications, by their work and by a storage that they wrote; the oldest are forgotten. A work is not held:
// it would hold its tensors. Another work that comes to lie at the address of one that is gone is a newer entry here, or
// of another kind.
class RecentComms {
 public:
  void add(uint32_t comm_id, c10d::Work* work, const c10::StorageImpl* storage) {
    std::lock_guard<std::mutex> guard(mutex_);
    const auto kind = work == nullptr ? c10d::OpType::UNKNOWN : work->retrieveOpType();
    entries_[next_++ % entries_.size()] = {comm_id, work, kind, storage};
  }

  // The newest communication of this work, or of this storage; 0: none that was recorded.
  uint32_t find(c10d::Work* work, const c10::StorageImpl* storage) {
    std::lock_guard<std::mutex> guard(mutex_);
    const auto kind = work == nullptr ? c10d::OpType::UNKNOWN : work->retrieveOpType();
    for (size_t back = 1; back <= entries_.size(); ++back) {
      const Entry& entry = entries_[(next_ + entries_.size() - back) % entries_.size()];
      if (entry.comm_id == 0) break;
      if ((work != nullptr && entry.work == work && entry.kind == kind) || (storage != nullptr && entry.storage == storage)) {
        return entry.comm_id;
      }
    }
    return 0;
  }

 private:
  struct Entry {
    uint32_t comm_id = 0;
    const c10d::Work* work = nullptr;
    c10d::OpType kind = c10d::OpType::UNKNOWN;
    const c10::StorageImpl* storage = nullptr;
  };

  std::mutex mutex_;
  std::array<Entry, 1024> entries_{};
  size_t next_ = 0;
};

}  // namespace truedag
