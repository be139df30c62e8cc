// A recording: one trace file, its tables, and what each thread keeps of it.
#pragma once

#include <ATen/SequenceNumber.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <time.h>

#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "memory.h"
#include "operators.h"
#include "tables.h"
#include "trace_file.h"
#include "waits.h"

namespace truedag {

inline int64_t now_ns() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return static_cast<int64_t>(time.tv_sec) * 1000000000 + time.tv_nsec;
}

// What a RecordFunction that is still open means to this thread.
enum class Frame : uint8_t { kTransparent, kLeaf, kInnerComm, kInside, kWait, kRegion };

// What a thread remembers of what it has seen, so that it asks the tables seldom.
struct Caches {
  struct OpSlot {
    const char* name = nullptr;
    OpEntry* entry = nullptr;
    const Call* call = nullptr;  // how it was called last
  };
  // By the address of the TensorImpl: right as long as all else is the same.
  struct TensorSlot {
    const void* storage = nullptr;
    int64_t offset = 0;
    const LayoutEntry* layout = nullptr;
    uint32_t id = 0;
  };
  struct StorageSlot {
    const void* impl = nullptr;
    const void* data = nullptr;
    uint64_t bytes = 0;
    uint32_t id = 0;
  };
  struct IdSlot {
    Tensor tensor{};
    uint32_t id = 0;
  };

  std::array<OpSlot, 1024> ops{};
  std::array<TensorSlot, 2048> tensors{};
  std::array<const LayoutEntry*, 1024> layouts{};
  std::array<StorageSlot, 2048> storages{};
  std::array<IdSlot, 4096> ids{};
};

// An operator whose record is being made.
struct OpenEvent {
  OpEntry* op = nullptr;
  const char* name = nullptr;
  Event event{};
  std::vector<Ref> refs;
  std::vector<uint32_t> places;  // element << 16 | arg of each
  uint32_t num_inputs = 0;
};

// What a region was given, by storage.
struct Region {
  using WeakStorage = c10::weak_intrusive_ptr<c10::StorageImpl>;
  using WeakTensor = c10::weak_intrusive_ptr<at::TensorImpl, at::UndefinedTensorImpl>;
  std::vector<std::pair<WeakStorage, WeakTensor>> given;
  std::unordered_map<const void*, const void*> tensor_of;
  bool may_reuse = false;
};

struct ThreadState {
  // A backward pass on this thread: the label around it, and the last of autograd's nodes that an operator ran in.
  struct Pass {
    int task = -1;
    uint32_t label_around = 0;
    uint32_t sequence = kNoSequence;
    uint32_t fwd_thread = 0;
  };

  // An operator that waits while a communication inside it is recorded.
  struct Waiting {
    OpenEvent open;
    size_t inside;
  };

  ThreadState(TraceFile& file, uint32_t index)
      : events(file, kEvents, index, sizeof(Event)),
        refs(file, kRefs, index, sizeof(Ref)),
        tensors(file, kTensors, index, sizeof(Tensor)),
        comms(file, kComms, index, sizeof(Comm)),
        works(file, kWorks, index, sizeof(Work)),
        frees(file, kFrees, index, sizeof(Free)),
        waits(file, kWaits, index, sizeof(Wait)),
        places(file, kPlaces, index, sizeof(Place)) {
    frames.reserve(256);
  }

  // The number of the newest node that autograd has made on this thread since this was last asked; kNoSequence: none.
  uint32_t newest_node() {
    const uint64_t next = at::sequence_number::peek();
    if (next == next_sequence) return kNoSequence;
    next_sequence = next;
    return static_cast<uint32_t>(next - 1);
  }

  // Many threads only ever run a backend's works: those need none. An operator that is gone may leave the address of
  // its name to another one.
  Caches& caches() {
    if (known == nullptr) known = std::make_unique<Caches>();
    return *known;
  }
  void forget_operators_that_are_gone() {
    const uint64_t gone = operators_gone.load(std::memory_order_relaxed);
    if (gone == num_gone) return;
    num_gone = gone;
    if (known != nullptr) known->ops.fill({});
  }

  // The backward pass that is autograd's graph task `task`; one that is new began under `label`.
  Pass& pass(int task, uint32_t label) {
    for (auto& known : passes) {
      if (known.task == task) return known;
    }
    auto& fresh = passes[next_pass++ % passes.size()];
    fresh = {task, label};
    return fresh;
  }

  std::vector<Frame> frames;
  std::unique_ptr<Caches> known;
  uint64_t num_gone = 0;
  size_t inside = 0;   // frames below the open leaf, itself included
  bool has_comm = false;
  uint64_t next_sequence = at::sequence_number::peek();  // what autograd's next node on this thread will be numbered
  Region region;
  bool muted = false;  // a backend's worker runs a communication here: its own operators are not the program's
  std::array<Pass, 8> passes{};  // the last ones: one can begin inside a node of another
  size_t next_pass = 0;
  OpenEvent open;
  Stream events, refs, tensors, comms, works, frees, waits, places;
  std::vector<Ref> scratch_refs;  // what a communication made for itself inside
  std::vector<uint32_t> scratch_places;
  std::vector<Waiting> waiting;
  std::vector<Wait> open_waits;
  Comm open_comm{};
};

struct Session {
  Session() : tables(file), storages(file) {}

  ThreadState* join() {
    std::lock_guard<std::mutex> guard(mutex);
    const auto index = static_cast<uint32_t>(threads.size());
    threads.push_back(std::make_unique<ThreadState>(file, index));
    tables.write(kThread, index,
                 "{\"autograd_thread\":" + std::to_string(at::RecordFunction::currentThreadId()) +
                     ",\"os_thread\":" + std::to_string(::syscall(SYS_gettid)) +
                     ",\"pthread\":" + std::to_string(static_cast<uint64_t>(::pthread_self())) + "}");
    return threads.back().get();
  }

  TraceFile file;
  TableWriter tables;
  OpTable ops;
  CallTable calls;
  LayoutTable layouts;
  StorageTable storages;
  GroupTable groups;
  RecentComms recent;
  std::atomic<uint32_t> next_comm_id{1};
  uint64_t generation = 0;
  std::mutex mutex;
  std::vector<std::unique_ptr<ThreadState>> threads;
};

}  // namespace truedag
