// The interceptor: a kernel that stands below autograd and above all backends for every operator there is. On a thread
// that includes its key it is called with an operator's arguments in a row, records what DESIGN's rule 2 calls an
// operator, and calls on. What a composite operator or autograd's own kernels call comes by like anything else, and what
// runs inside an operator does not come by at all: nobody need be told of it only to find that it does not matter.
// That is a fifth of what being told of each event costs.
//
// A thread begins as one that is observed (observer.h) and is intercepted from the end of its first operator on. The
// key is one that PyTorch keeps for a fake tensor mode of its own and gives to no kernel.
#pragma once

#include <torch/library.h>

#include "observer.h"

namespace truedag {

enum class Passage : uint8_t {
  kThrough,   // what it calls is looked at
  kInternal,  // it is none of the program's, nor is what it calls
  kWait,      // it waits for a functional collective
  kClosed,    // an operator that is recorded; inside it nothing is of interest
  kOpen,      // one inside which there may be communications: those are announced to the observer
};

inline c10::ArrayRef<const c10::IValue> last_values(const torch::jit::Stack& stack, size_t count) {
  return c10::ArrayRef<const c10::IValue>(stack.data() + (stack.size() - count), count);
}

// What comes by is announced to observers where somebody else listens, and only there.
inline void settle_announcements() {
  const bool wanted = num_listeners.load(std::memory_order_relaxed) > 0;
  if (at::isRecordFunctionEnabled() != wanted) at::enableRecordFunction(wanted);
}

inline Passage let_in(Session& session, ThreadState& state, ThreadSlot& slot, const c10::OperatorHandle& handle,
                      const torch::jit::Stack& stack) {
  const char* name = handle.schema().name().c_str();
  OpEntry* op = find_op(session, state, name, handle);
  const auto inputs = last_values(stack, op->num_arguments);
  if (is_internal(state)) {
    if (!is_inner_comm(state, name) || op->kind != OpClass::kComm) return Passage::kInternal;
    open_inner_comm(session, state, slot, *op, name, inputs);
    return Passage::kOpen;
  }
  switch (kind_of(*op, inputs)) {
    case OpClass::kTransparent:
      return Passage::kThrough;
    case OpClass::kWait:
      open_wait(session, state, inputs);
      state.frames.push_back(Frame::kWait);
      return Passage::kWait;
    case OpClass::kLeaf:
    case OpClass::kComm:
      break;
  }
  open_leaf(session, state, slot, *op, name, inputs, Frame::kLeaf);
  return op->closed.load(std::memory_order_relaxed) ? Passage::kClosed : Passage::kOpen;
}

inline Passage begin_passage(ThreadSlot* slot, const c10::OperatorHandle& handle, const torch::jit::Stack& stack) {
  const SessionHold hold(slot);
  Session* session = hold.get();
  if (session == nullptr) {
    if (slot != nullptr && slot->busy.load(std::memory_order_relaxed) && active_session.load() != nullptr) {
      return Passage::kInternal;  // the recorder's own
    }
    observe_from_here();
    return Passage::kThrough;
  }
  try {
    settle_announcements();
    return let_in(*session, *thread_state(session, *slot), *slot, handle, stack);
  } catch (const std::exception& error) {
    switch_off(error.what());
    return Passage::kThrough;
  }
}

inline void end_passage(ThreadSlot* slot, const c10::OperatorHandle& handle, const torch::jit::Stack* stack) {
  const SessionHold hold(slot);
  Session* session = hold.get();
  if (slot->comm_generation != 0 && (session == nullptr || slot->comm_generation != session->generation)) {
    close_comm(*slot);  // the recording ended inside a communication
  }
  if (session == nullptr) return;
  try {
    ThreadState& state = *thread_state(session, *slot);
    if (state.frames.empty()) return;  // it began before this recording
    const Frame frame = state.frames.back();
    state.frames.pop_back();
    if (frame == Frame::kWait) {
      state.open_waits.back().end_ns = now_ns();
      state.waits.append(&state.open_waits.back(), sizeof(Wait));
      state.open_waits.pop_back();
    } else if (frame == Frame::kLeaf || frame == Frame::kInnerComm) {
      const size_t count = stack == nullptr ? 0 : handle.schema().returns().size();
      close_leaf(*session, state, frame, stack == nullptr ? c10::ArrayRef<const c10::IValue>() : last_values(*stack, count),
                 stack == nullptr);
    }
    if (!intercepts.load(std::memory_order_relaxed)) observe_from_here();
  } catch (const std::exception& error) {
    switch_off(error.what());
  }
}

// Announces to the observer what runs inside an operator.
class Announcing {
 public:
  explicit Announcing(bool wanted) : is_changed_(wanted && !at::isRecordFunctionEnabled()) {
    if (is_changed_) at::enableRecordFunction(true);
  }
  ~Announcing() {
    if (is_changed_) at::enableRecordFunction(false);
  }
  Announcing(const Announcing&) = delete;
  Announcing& operator=(const Announcing&) = delete;

 private:
  bool is_changed_;
};

inline void intercept(const c10::OperatorHandle& handle, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const auto below = keys & c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER, kInterceptKey);
  ThreadSlot* slot = thread_slot();
  const Passage passage = begin_passage(slot, handle, *stack);
  if (passage == Passage::kThrough) return handle.redispatchBoxed(below, stack);
  if (passage == Passage::kInternal) {
    const c10::impl::ExcludeDispatchKeyGuard guard(kInterceptKey);
    return handle.redispatchBoxed(below, stack);
  }
  try {
    if (passage == Passage::kWait) {
      handle.redispatchBoxed(below, stack);
    } else {
      const c10::impl::ExcludeDispatchKeyGuard guard(kInterceptKey);
      const Announcing announcing(passage == Passage::kOpen);
      handle.redispatchBoxed(below, stack);
    }
  } catch (...) {
    end_passage(slot, handle, nullptr);
    throw;
  }
  end_passage(slot, handle, stack);
}

// Whether the interceptor stands in the dispatcher; it is put there once a process, for good.
inline bool stand_in_dispatcher() {
  static const bool stands = [] {
    try {
      auto* library = new torch::Library(torch::Library::IMPL, "_", kInterceptKey, __FILE__, __LINE__);
      library->fallback(torch::CppFunction::makeFromBoxedFunction<&intercept>());
      return true;
    } catch (const std::exception&) {
      return false;  // somebody else stands there
    }
  }();
  return stands;
}

}  // namespace truedag
