// The observer: PyTorch's dispatcher calls on_start and on_end around every operator of a thread that is not
// intercepted (interceptor.h), and around backends' works. Nested events of a thread are reduced to operators on the
// spot (DESIGN rule 2): a transparent event is walked through, the outermost other one is recorded, and of what runs
// inside it only communications are.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <ATen/Parallel.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/ThreadLocalDebugInfo.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/graph_task.h>

#include "communications.h"
#include "tensors.h"

namespace truedag {

constexpr c10::DispatchKeySet kWrapperKeys({c10::DispatchKey::Python, c10::DispatchKey::FuncTorchBatched,
                                            c10::DispatchKey::FuncTorchGradWrapper});

inline bool is_wrapper(const at::Tensor& tensor) {
  return tensor.defined() && tensor.key_set().has_any(kWrapperKeys);
}

// A boxed call is told with all that lies on its interpreter's stack; its own values are the last ones.
inline c10::ArrayRef<const c10::IValue> own_inputs(const at::RecordFunction& fn) {
  const auto all = fn.inputs();
  const size_t count = fn.num_inputs();
  return all.size() > count ? all.slice(all.size() - count) : all;
}

inline c10::ArrayRef<const c10::IValue> own_outputs(const at::RecordFunction& fn) {
  const c10::ArrayRef<const c10::IValue> all(fn.outputs().data(), fn.outputs().size());
  const size_t count = fn.num_outputs();
  return all.size() > count ? all.slice(all.size() - count) : all;
}

// A tensor subclass (DTensor), a dispatch mode or a functorch transform answers this call: the operators are what it
// calls.
inline bool answered_elsewhere(c10::ArrayRef<const c10::IValue> inputs) {
  const auto keys = c10::impl::tls_local_dispatch_key_set();
  constexpr c10::DispatchKeySet asked(
      {c10::DispatchKey::Python, c10::DispatchKey::FuncTorchDynamicLayerFrontMode});
  if ((keys.included_ - keys.excluded_).has_any(asked)) return true;
  for (const auto& value : inputs) {
    if (value.isTensor()) {
      if (is_wrapper(value.toTensor())) return true;
    } else if (value.isTensorList()) {
      for (const auto& item : value.toListRef()) {
        if (item.isTensor() && is_wrapper(item.toTensor())) return true;
      }
    }
  }
  return false;
}

inline Caches::OpSlot& op_slot(ThreadState& state, const char* name) {
  auto& ops = state.caches().ops;
  return ops[(reinterpret_cast<uint64_t>(name) >> 4) % ops.size()];
}

// By whatever announces it; the name's address is that of its schema in either case.
template <typename Announcer>
inline OpEntry* find_op(Session& session, ThreadState& state, const char* name, const Announcer& announcer) {
  state.forget_operators_that_are_gone();
  auto& known = op_slot(state, name);
  if (known.name == name) [[likely]] return known.entry;
  OpEntry* entry = session.ops.find(Announced(announcer), session.tables);
  if (entry->stable) known = {name, entry, nullptr};
  return entry;
}

inline OpEntry* find_op(Session& session, ThreadState& state, const at::RecordFunction& fn) {
  return find_op(session, state, fn.name(), fn);
}

[[gnu::cold]] inline std::unique_ptr<at::ObserverContext> start_work(Session& session, ThreadState& state,
                                                       const at::RecordFunction& fn) {
  const auto* info = static_cast<const CommInfo*>(c10::ThreadLocalDebugInfo::get(kCommInfo));
  if (info == nullptr || info->generation != session.generation) return nullptr;
  auto context = std::make_unique<WorkContext>();
  context->generation = session.generation;
  context->work.comm_id = info->id;
  context->work.op = session.ops.find(Announced(fn), session.tables)->id;
  if (state.inside == 0) {
    state.muted = true;
    state.has_comm = false;
    context->worker = &state;
  }
  context->work.start_ns = now_ns();
  return context;
}

// Where an event belongs: what was said on its thread, and what autograd knows of it.
inline void set_place(Event& event, ThreadState& state, const ThreadSlot& slot) {
  event.label = slot.label;
  event.context = slot.context;
  event.sequence = event.backward_sequence = kNoSequence;
  const int task = torch::autograd::get_current_graph_task_id();
  if (task == -1) return;
  event.flags |= kInBackward;
  auto& pass = state.pass(task, slot.label);
  // A label from around the backward pass says nothing of what runs in it; one set inside (recomputation) does.
  if (pass.label_around == slot.label) event.label = 0;
  if (const auto node = torch::autograd::get_current_node()) {
    pass.sequence = static_cast<uint32_t>(node->sequence_nr());
    pass.fwd_thread = static_cast<uint32_t>(node->thread_id());
  }
  // The engine's own work on what a node gave (sums to the right shape, additions of gradients) is that node's.
  event.backward_sequence = pass.sequence;
  event.fwd_thread = pass.fwd_thread;
}

inline const Call* find_call(Session& session, ThreadState& state, const OpenEvent& open) {
  // The slot may be another operator's by now: then its last call is not ours either.
  auto& known = op_slot(state, open.name);
  const bool is_ours = known.entry == open.op;
  if (is_ours && known.call != nullptr && known.call->same(open.num_inputs, open.places)) return known.call;
  const Call* call = session.calls.find(open.op->id, open.num_inputs, open.places, session.tables);
  if (is_ours) known.call = call;
  return call;
}

// What an operator is to the recorder on the device of its tensors: one that is composite elsewhere may have a kernel of
// its own there, and no other operator runs inside it then. Tensors without memory (meta) stand for those of a CPU.
inline OpClass kind_of(const OpEntry& op, c10::ArrayRef<const c10::IValue> inputs) {
  if (!op.has_cpu_kernel && !op.has_cuda_kernel) [[likely]] return op.kind;
  for (const auto& value : inputs) {
    if (!value.isTensor() || !value.toTensor().defined()) continue;
    const auto device = value.toTensor().device().type();
    const bool has_kernel = ((device == c10::kCPU || device == c10::kMeta) && op.has_cpu_kernel) ||
                            (device == c10::kCUDA && op.has_cuda_kernel);
    return has_kernel ? OpClass::kLeaf : op.kind;
  }
  return op.kind;
}

// Begins the record of an operator, or of a communication.
inline void open_leaf(Session& session, ThreadState& state, ThreadSlot& slot, OpEntry& op, const char* name,
                      c10::ArrayRef<const c10::IValue> inputs, Frame frame) {
  auto& open = state.open;
  open.op = &op;
  open.name = name;
  open.event = Event{};
  set_place(open.event, state, slot);
  open.refs.clear();
  open.places.clear();
  for (size_t i = 0; i < inputs.size(); ++i) {
    uint16_t element = 0;
    add_value(session, state, open.refs, open.places, inputs[i], static_cast<uint16_t>(i), element, true);
  }
  open.num_inputs = static_cast<uint32_t>(open.refs.size());
  state.has_comm = false;
  if (op.kind == OpClass::kComm) {
    state.scratch_refs.clear();
    state.scratch_places.clear();
    open_comm(session, state, op, inputs);
  }
  state.inside = 1;
  state.frames.push_back(frame);
  open.event.start_ns = now_ns();
}

// Whether a communication runs inside an operator that is none itself (a library's, whose kernel communicates).
inline bool is_inner_comm(const ThreadState& state, const char* name) {
  return state.inside > 0 && !state.has_comm && !state.muted && std::strncmp(name, "c10d::", 6) == 0;
}

// Begins the record of one: ranks meet in it whatever it is inside of; the operator around it waits.
inline void open_inner_comm(Session& session, ThreadState& state, ThreadSlot& slot, OpEntry& op, const char* name,
                            c10::ArrayRef<const c10::IValue> inputs) {
  state.open.op->closed.store(false, std::memory_order_relaxed);
  state.waiting.push_back({std::move(state.open), state.inside});
  open_leaf(session, state, slot, op, name, inputs, Frame::kInnerComm);
}

// Whether what runs here is none of the program's: inside an operator, on a thread that helps with one, or for a
// backend's work. A backend's worker has a Python thread state only while a callback of the communication's future runs
// on it, and that is the program's.
inline bool is_internal(const ThreadState& state) {
  return state.inside > 0 || at::in_parallel_region() || (state.muted && PyGILState_GetThisThreadState() == nullptr);
}

// Whether operators of this thread come by the interceptor.
constexpr auto kInterceptKey = c10::DispatchKey::Fake;
inline bool is_intercepted() {
  const auto keys = c10::impl::tls_local_dispatch_key_set();
  return (keys.included_ - keys.excluded_).has(kInterceptKey);
}

// Others who observe operators (profilers) while this recording runs.
inline std::atomic<int> num_listeners{0};

// Whether this recording intercepts. It only observes where the key is taken, and in programs that compile: PyTorch's
// compiler looks at a thread's dispatch keys, and would compile anew.
inline std::atomic<bool> intercepts{false};

// From here on operators of this thread come by the interceptor, and are announced to nobody if nobody else listens.
inline void intercept_from_here() {
  if (is_intercepted() || !intercepts.load(std::memory_order_relaxed)) return;
  c10::impl::tls_set_dispatch_key_included(kInterceptKey, true);
}

inline void observe_from_here() {
  if (!c10::impl::tls_is_dispatch_key_included(kInterceptKey)) return;
  c10::impl::tls_set_dispatch_key_included(kInterceptKey, false);
  at::enableRecordFunction(true);
}

// A functional collective's tensor is waited for: by which communication it was written, the storage tells.
[[gnu::cold]] inline void open_wait(Session& session, ThreadState& state, c10::ArrayRef<const c10::IValue> inputs) {
  Wait wait{};
  if (!inputs.empty() && inputs[0].isTensor() && inputs[0].toTensor().has_storage()) {
    wait.comm_id = session.recent.find(nullptr, inputs[0].toTensor().storage().unsafeGetStorageImpl());
  }
  wait.start_ns = now_ns();
  state.open_waits.push_back(wait);
}

inline std::unique_ptr<at::ObserverContext> start(Session& session, ThreadState& state, ThreadSlot& slot,
                                                  const at::RecordFunction& fn) {
  const auto scope = fn.scope();
  if (scope == at::RecordScope::USER_SCOPE) {
    // A backend announces the work of the communication in whose name it runs; other user scopes pass.
    return c10::ThreadLocalDebugInfo::get(kCommInfo) == nullptr ? nullptr : start_work(session, state, fn);
  }
  if (is_internal(state)) {
    if (is_inner_comm(state, fn.name()) && find_op(session, state, fn)->kind == OpClass::kComm) {
      open_inner_comm(session, state, slot, *find_op(session, state, fn), fn.name(), own_inputs(fn));
      return nullptr;
    }
    ++state.inside;
    state.frames.push_back(Frame::kInside);
    return nullptr;
  }
  if (is_intercepted()) {
    state.frames.push_back(Frame::kTransparent);
    return nullptr;
  }
  OpEntry* op = find_op(session, state, fn);
  switch (kind_of(*op, own_inputs(fn))) {
    case OpClass::kTransparent:
      state.frames.push_back(Frame::kTransparent);
      return nullptr;
    case OpClass::kWait:
      open_wait(session, state, own_inputs(fn));
      state.frames.push_back(Frame::kWait);
      return nullptr;
    case OpClass::kLeaf:
    case OpClass::kComm:
      break;
  }
  const auto inputs = own_inputs(fn);
  if (answered_elsewhere(inputs)) {
    state.frames.push_back(Frame::kTransparent);
    return nullptr;
  }
  open_leaf(session, state, slot, *op, fn.name(), inputs, Frame::kLeaf);
  return nullptr;
}

// Writes the record of the open event.
inline void write_open(Session& session, ThreadState& state, int64_t duration) {
  auto& open = state.open;
  auto& event = open.event;
  const bool is_long = duration > int64_t{0xffffffff};
  if (is_long) event.flags |= kLong;
  event.duration = static_cast<uint32_t>(is_long ? duration >> 10 : duration);
  event.call = find_call(session, state, open)->id;
  const size_t ref_bytes = open.refs.size() * sizeof(Ref);
  if (ref_bytes > 0) state.refs.append(open.refs.data(), ref_bytes);
  state.events.append(&event, sizeof(event));
}

inline void end_leaf(Session& session, ThreadState& state, c10::ArrayRef<const c10::IValue> outputs, bool has_failed) {
  auto& open = state.open;
  auto& event = open.event;
  const int64_t duration = now_ns() - event.start_ns;
  event.sequence = state.newest_node();
  for (size_t i = 0; i < outputs.size(); ++i) {
    uint16_t element = 0;
    add_value(session, state, open.refs, open.places, outputs[i], static_cast<uint16_t>(i), element, false);
  }
  if (state.has_comm) {
    close_comm(*this_slot);
    if (!outputs.empty() && outputs.back().isCustomClass()) {
      session.recent.add(state.open_comm.id, outputs.back().toCustomClass<c10d::Work>().get(), nullptr);
    }
    open.refs.insert(open.refs.end(), state.scratch_refs.begin(), state.scratch_refs.end());
    open.places.insert(open.places.end(), state.scratch_places.begin(), state.scratch_places.end());
    state.comms.append(&state.open_comm, sizeof(Comm));
    event.flags |= kIsComm;
  }
  if (has_failed) event.flags |= kFailed;
  write_open(session, state, duration);
}

// Ends the open operator, or the communication inside it.
inline void close_leaf(Session& session, ThreadState& state, Frame frame, c10::ArrayRef<const c10::IValue> outputs,
                       bool has_failed) {
  if (frame == Frame::kLeaf) {
    state.inside = 0;
    end_leaf(session, state, outputs, has_failed);
    state.has_comm = false;
    return;
  }
  end_leaf(session, state, outputs, has_failed);
  state.has_comm = false;
  auto& outer = state.waiting.back();
  state.open = std::move(outer.open);
  state.inside = outer.inside;
  state.waiting.pop_back();
}

// Writes down which of autograd's nodes were made under the label and context that end here: no operator may follow
// under them that would carry their number.
inline void note_nodes(Session& session, ThreadState& state, const ThreadSlot& slot) {
  const uint32_t newest = state.newest_node();
  if (newest == kNoSequence) return;
  Event event{};
  event.start_ns = now_ns();
  const OpEntry* op = session.ops.find_region("truedag::scope", "", "", session.tables);
  event.call = session.calls.find(op->id, 0, {}, session.tables)->id;
  set_place(event, state, slot);
  event.sequence = newest;
  event.flags |= kRange;
  state.events.append(&event, sizeof(event));
}

inline std::unique_ptr<at::ObserverContext> on_start(const at::RecordFunction& fn) {
  ThreadSlot* slot = thread_slot();
  const SessionHold hold(slot);
  Session* session = hold.get();
  if (session == nullptr) return nullptr;
  try {
    return start(*session, *thread_state(session, *slot), *slot, fn);
  } catch (const std::exception& error) {
    switch_off(error.what());
    return nullptr;
  }
}

[[gnu::cold]] inline void end_work(Session& session, ThreadState& state, WorkContext& context) {
  if (context.generation != session.generation) return;
  context.work.end_ns = now_ns();
  if (context.worker == &state) state.muted = false;
  state.works.append(&context.work, sizeof(Work));
}

inline void end_frame(Session& session, ThreadState& state, const at::RecordFunction& fn) {
  const Frame frame = state.frames.back();
  state.frames.pop_back();
  switch (frame) {
    case Frame::kTransparent:
      return;
    case Frame::kInside:
      --state.inside;
      if (state.has_comm) {
        uint16_t element = 0;
        for (const auto& output : own_outputs(fn)) {
          add_value(session, state, state.scratch_refs, state.scratch_places, output, kScratchArg, element, false);
        }
      }
      return;
    case Frame::kRegion:
      return;  // ends by itself
    case Frame::kWait:
      state.open_waits.back().end_ns = now_ns();
      state.waits.append(&state.open_waits.back(), sizeof(Wait));
      state.open_waits.pop_back();
      return;
    case Frame::kLeaf:
    case Frame::kInnerComm: {
      const auto outputs = own_outputs(fn);
      close_leaf(session, state, frame, outputs, outputs.empty() && fn.num_outputs() > 0);
      return;
    }
  }
}

inline void on_end(const at::RecordFunction& fn, at::ObserverContext* context) {
  ThreadSlot* slot = thread_slot();
  const SessionHold hold(slot);
  if (slot == nullptr) return;
  Session* session = hold.get();
  if (slot->comm_generation != 0 && (session == nullptr || slot->comm_generation != session->generation)) {
    close_comm(*slot);  // the recording ended inside a communication
  }
  if (session == nullptr) return;
  try {
    ThreadState& state = *thread_state(session, *slot);
    if (context != nullptr) {
      end_work(*session, state, *static_cast<WorkContext*>(context));
    } else if (fn.scope() != at::RecordScope::USER_SCOPE && !state.frames.empty()) {
      end_frame(*session, state, fn);  // an empty stack: it began before this recording
    }
    const bool may_intercept = fn.scope() == at::RecordScope::FUNCTION && !state.muted && !at::in_parallel_region();
    if (may_intercept && state.frames.empty()) {
      intercept_from_here();
    }
  } catch (const std::exception& error) {
    switch_off(error.what());
  }
}

}  // namespace truedag
