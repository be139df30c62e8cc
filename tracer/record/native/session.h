// A recording: one trace file, its tables, and what each thread keeps of it.
#pragma once

#include <sys/syscall.h>
#include <time.h>

#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "tables.h"
#include "trace_file.h"

namespace truedag {

inline int64_t now_ns() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return static_cast<int64_t>(time.tv_sec) * 1000000000 + time.tv_nsec;
}

struct Session;

// What a RecordFunction that is still open means to this thread.
enum class Frame : uint8_t { kTransparent, kLeaf, kInnerComm, kInside, kBackward, kEngine };

struct ThreadState {
  static constexpr size_t kCacheSize = 4096;

  struct OpSlot {
    const char* name = nullptr;
    OpEntry* entry = nullptr;
  };
  struct LayoutSlot {
    uint64_t hash = 0;
    const LayoutEntry* entry = nullptr;
  };
  struct StorageSlot {
    const void* impl = nullptr;
    const void* data = nullptr;
    uint64_t bytes = 0;
    uint32_t id = 0;
  };
  struct Backward {
    int64_t sequence;
    uint64_t fwd_thread;
  };

  // An operator that waits while a communication inside it is recorded.
  struct Waiting {
    Event open;
    std::vector<Ref> refs;
    size_t inside;
  };

  ThreadState(TraceFile& file, uint32_t index)
      : events(file, kEvents, index, sizeof(Event), size_t{256} << 10),
        refs(file, kRefs, index, sizeof(Ref), size_t{256} << 10),
        comms(file, kComms, index, sizeof(Comm), size_t{16} << 10),
        works(file, kWorks, index, sizeof(Work), size_t{16} << 10) {
    frames.reserve(1024);
    open_refs.reserve(256);
    backward.reserve(64);
  }

  Stream events, refs, comms, works;
  std::vector<Frame> frames;
  size_t inside = 0;   // frames below the open leaf, itself included
  bool muted = false;  // a backend's worker runs a communication here: its own operators are not the program's
  std::vector<Backward> backward;
  std::vector<uint32_t> engine_labels;  // the label when each of the engine's open frames began
  Backward engine_node{-1, 0};          // the last node that ran inside the engine's current frame
  std::string error;
  Event open{};
  std::vector<Ref> open_refs;
  std::vector<Ref> scratch_refs;  // what a communication made for itself inside
  std::vector<Waiting> waiting;
  Comm open_comm{};
  bool has_comm = false;
  std::array<OpSlot, 1024> ops{};
  std::array<LayoutSlot, kCacheSize> layouts{};
  std::array<StorageSlot, kCacheSize> storages{};
};

struct Session {
  Session() : tables(file) {}

  ThreadState* join() {
    std::lock_guard<std::mutex> guard(mutex);
    const auto index = static_cast<uint32_t>(threads.size());
    threads.push_back(std::make_unique<ThreadState>(file, index));
    tables.write(kThread, index,
                 "{\"autograd_thread\":" + std::to_string(at::RecordFunction::currentThreadId()) +
                     ",\"os_thread\":" + std::to_string(::syscall(SYS_gettid)) + "}",
                 error);
    return threads.back().get();
  }

  TraceFile file;
  TableWriter tables;
  OpTable ops;
  LayoutTable layouts;
  StorageTable storages;
  GroupTable groups;
  std::atomic<uint32_t> next_comm_id{1};
  uint64_t generation = 0;
  std::mutex mutex;
  std::vector<std::unique_ptr<ThreadState>> threads;
  std::string error;    // of opening and of what Python writes
  std::string failure;  // why it switched itself off
};

}  // namespace truedag
