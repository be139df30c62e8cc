// Which session runs, and each thread's place in it. A callback holds the session while it looks at it; stopping waits
// until nobody holds it. That is all the synchronisation there is between recording threads and the one that stops.
#pragma once

#include <linux/membarrier.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdio>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "session.h"

namespace truedag {

inline std::atomic<Session*> active_session{nullptr};
inline std::atomic<uint64_t> session_generation{0};

// Where the kernel can run a barrier on all threads of the process, the one that stops pays for it and a callback does
// not. Registered once, when the module is loaded.
inline const bool barrier_on_all_threads =
    ::syscall(SYS_membarrier, MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED, 0, 0) == 0;

// A thread's place in the running session, and what Python said last on it.
struct ThreadSlot {
  std::atomic<bool> busy{false};  // in a callback: the session it found there must stay
  uint64_t generation = 0;
  ThreadState* state = nullptr;
  uint32_t label = 0;
  uint32_t context = 0;
  uint64_t comm_generation = 0;  // of the session whose communication is open on this thread; 0: none
};

// All threads' slots, so that stopping can wait until nobody is in a callback.
struct SlotList {
  std::mutex mutex;
  std::vector<ThreadSlot*> slots;
};
inline SlotList* slot_list = new SlotList();  // outlives every thread
inline SlotList& all_slots() { return *slot_list; }

struct SlotHolder {
  SlotHolder() : slot(new ThreadSlot()) {
    std::lock_guard<std::mutex> guard(all_slots().mutex);
    all_slots().slots.push_back(slot);
  }
  ~SlotHolder();
  ThreadSlot* slot;
};
inline thread_local ThreadSlot* this_slot = nullptr;
inline thread_local bool thread_ends = false;

// Null once the thread is being torn down.
inline ThreadSlot* thread_slot() {
  if (this_slot == nullptr && !thread_ends) {
    static thread_local SlotHolder holder;
    this_slot = holder.slot;
  }
  return this_slot;
}

// Holds the running session for as long as a callback looks at it. One inside another is part of it.
class SessionHold {
 public:
  explicit SessionHold(ThreadSlot* slot) : slot_(slot) {
    if (slot_ == nullptr) return;
    if (slot_->busy.load(std::memory_order_relaxed)) {
      slot_ = nullptr;
    } else if (barrier_on_all_threads) {
      slot_->busy.store(true, std::memory_order_relaxed);
      std::atomic_signal_fence(std::memory_order_seq_cst);
    } else {
      slot_->busy.store(true, std::memory_order_seq_cst);
    }
    session_ = active_session.load(std::memory_order_seq_cst);
  }
  ~SessionHold() {
    if (slot_ != nullptr) slot_->busy.store(false, std::memory_order_release);
  }
  SessionHold(const SessionHold&) = delete;
  SessionHold& operator=(const SessionHold&) = delete;
  Session* get() const { return session_; }

 private:
  ThreadSlot* slot_;
  Session* session_ = nullptr;
};

// What a thread remembered is of no use once it is gone: of a program's short-lived ones there may be many.
inline SlotHolder::~SlotHolder() {
  {
    const SessionHold hold(slot);
    const Session* session = hold.get();
    if (session != nullptr && slot->generation == session->generation) slot->state->known.reset();
  }
  this_slot = nullptr;
  thread_ends = true;
  std::lock_guard<std::mutex> guard(all_slots().mutex);
  auto& slots = all_slots().slots;
  slots.erase(std::remove(slots.begin(), slots.end(), slot), slots.end());
  delete slot;
}

// Ends the session for all threads: returns when none is in a callback any more.
inline void quiesce() {
  active_session.store(nullptr, std::memory_order_seq_cst);
  if (barrier_on_all_threads) ::syscall(SYS_membarrier, MEMBARRIER_CMD_PRIVATE_EXPEDITED, 0, 0);
  std::lock_guard<std::mutex> guard(all_slots().mutex);
  for (const auto* slot : all_slots().slots) {
    while (slot->busy.load(std::memory_order_acquire)) std::this_thread::yield();
  }
}

inline std::array<char, 512> failure{};  // why the recording switched itself off

// The recorder can't go on; the program runs on. Told once.
inline void switch_off(const char* why) noexcept {
  if (active_session.exchange(nullptr) == nullptr) return;
  std::snprintf(failure.data(), failure.size(), "%s", why);
  std::fprintf(stderr, "truedag: recording stopped, the program runs on: %s\n", why);
}

inline ThreadState* thread_state(Session* session, ThreadSlot& slot) {
  if (slot.generation != session->generation) {
    slot.state = session->join();
    slot.generation = session->generation;
    slot.label = slot.context = 0;  // what was said to an earlier recording
  }
  return slot.state;
}

// This thread's place in the running session, which stays as long as this lives; false where nothing is recorded.
class Recorded {
 public:
  Recorded() : slot(thread_slot()), hold_(slot), session(hold_.get()) {
    if (session != nullptr) state = thread_state(session, *slot);
  }
  explicit operator bool() const { return session != nullptr; }

  ThreadSlot* const slot;

 private:
  SessionHold hold_;

 public:
  Session* const session;
  ThreadState* state = nullptr;
};

}  // namespace truedag
