// The observer: PyTorch's dispatcher calls on_start and on_end around every operator. Nested events of a thread are
// reduced to operators on the spot (DESIGN rule 2): a transparent event is walked through, the outermost other one is
// recorded, and of what runs inside it only communications are.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <ATen/record_function.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <c10/util/ThreadLocalDebugInfo.h>

#include "session.h"
#include "slots.h"

namespace truedag {

// Travels with autograd's and c10d's thread-local state to the thread where a communication's work runs.
constexpr std::string_view kCommInfoName = "TRUEDAG_COMM";
inline const c10::DebugInfoKind kCommInfo(&kCommInfoName);
struct CommInfo : public c10::DebugInfoBase {
  CommInfo(uint64_t generation, uint32_t id) : generation(generation), id(id) {}
  uint64_t generation;
  uint32_t id;
};

// Kept by PyTorch between the start and the end of a communication's work, which may be on another thread.
struct WorkContext : public at::ObserverContext {
  Work work{};
  uint64_t generation = 0;
  ThreadState* worker = nullptr;  // the backend's thread that runs it
};

constexpr c10::DispatchKeySet kWrapperKeys({c10::DispatchKey::Python, c10::DispatchKey::FuncTorchBatched,
                                            c10::DispatchKey::FuncTorchGradWrapper});

inline bool is_wrapper(const at::Tensor& tensor) {
  return tensor.defined() && tensor.key_set().has_any(kWrapperKeys);
}

inline void add_ref(Session& session, ThreadState& state, std::vector<Ref>& refs, const at::Tensor& tensor,
                    uint16_t arg, uint16_t element, bool is_input) {
  // A number that became a tensor on the way is a constant of the call, not data that flowed.
  if (!tensor.defined() || tensor.unsafeGetTensorImpl()->is_wrapped_number()) return;
  Ref ref{};
  ref.arg = arg;
  ref.element = element;
  const auto* impl = tensor.unsafeGetTensorImpl();
  if (impl->has_storage() && impl->layout() == c10::kStrided && !tensor.is_nested() &&
      !impl->has_symbolic_sizes_strides()) {
    auto* storage = impl->unsafe_storage().unsafeGetStorageImpl();
    const void* data = storage->_mutable_data_ptr_no_checks().get();
    const uint64_t bytes = storage->nbytes();
    auto& known = state.storages[(reinterpret_cast<uint64_t>(storage) >> 5) % ThreadState::kCacheSize];
    if (known.impl != storage || known.data != data || known.bytes != bytes) {
      known = {storage, data, bytes,
               session.storages.find(storage, data, bytes, is_input, session.tables, state.error)};
    }
    ref.storage = known.id;
    const auto dtype = static_cast<int32_t>(tensor.scalar_type());
    const auto device = static_cast<int32_t>(tensor.device().type());
    const auto itemsize = static_cast<int32_t>(tensor.dtype().itemsize());
    const auto sizes = impl->sizes();
    const auto strides = impl->strides();
    ref.offset_bytes = impl->storage_offset() * itemsize;
    const uint64_t hash = hash_layout(dtype, device, sizes, strides);
    auto& layout = state.layouts[hash % ThreadState::kCacheSize];
    if (layout.entry == nullptr || layout.hash != hash || !layout.entry->same(dtype, device, sizes, strides)) {
      layout = {hash, session.layouts.find(hash, dtype, device, itemsize, sizes, strides, session.tables, state.error)};
    }
    ref.layout = layout.entry->id;
  }
  refs.push_back(ref);
}

inline void add_refs(Session& session, ThreadState& state, std::vector<Ref>& refs, const c10::IValue& value,
                     uint16_t arg, uint16_t& element, bool is_input) {
  if (value.isTensor()) {
    add_ref(session, state, refs, value.toTensor(), arg, element++, is_input);
  } else if (value.isList()) {
    for (const auto& item : value.toListRef()) {
      if (!item.isTensor() && !item.isList() && !item.isNone()) break;
      add_refs(session, state, refs, item, arg, element, is_input);
    }
  } else if (value.isTuple()) {
    for (const auto& item : value.toTupleRef().elements()) add_refs(session, state, refs, item, arg, element, is_input);
  }
}

// A tensor subclass (DTensor), a dispatch mode or a functorch transform answers this call: the operators are what it
// calls.
inline bool answered_elsewhere(c10::ArrayRef<const c10::IValue> inputs) {
  if (c10::impl::TorchDispatchModeTLS::any_modes_set()) return true;
  const auto keys = c10::impl::tls_local_dispatch_key_set();
  if ((keys.included_ - keys.excluded_).has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode)) return true;
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

inline int64_t backend_sequence(c10d::ProcessGroup& group) {
  try {
    return static_cast<int64_t>(group.getSequenceNumberForGroup());
  } catch (const std::exception&) {
    return -1;  // this backend does not count
  }
}

inline void open_comm(Session& session, ThreadState& state, const OpEntry& op,
                      c10::ArrayRef<const c10::IValue> inputs) {
  const auto group = inputs[op.group_arg].toCustomClass<c10d::ProcessGroup>();
  Comm comm{};
  comm.sequence = backend_sequence(*group);
  comm.peer = op.peer_arg >= 0 ? static_cast<int32_t>(inputs[op.peer_arg].toInt()) : -1;
  comm.tag = op.tag_arg >= 0 ? static_cast<int32_t>(inputs[op.tag_arg].toInt()) : -1;
  comm.reduce_op = -1;
  if (op.reduce_arg >= 0) {
    comm.reduce_op = static_cast<int32_t>(inputs[op.reduce_arg].toCustomClass<c10d::ReduceOp>()->op_);
  }
  comm.async_op = op.p2p || (op.async_arg >= 0 && inputs[op.async_arg].toBool());
  comm.id = session.next_comm_id.fetch_add(1);
  {
    std::lock_guard<std::mutex> guard(session.groups.mutex);
    auto* entry = session.groups.find(*group, session.tables, state.error);
    comm.group = entry->id;
    comm.order = op.p2p ? entry->num_p2p++ : entry->num_collectives++;
  }
  state.open_comm = comm;
  state.has_comm = true;
  c10::ThreadLocalDebugInfo::_push(kCommInfo, std::make_shared<CommInfo>(session.generation, comm.id));
  this_slot->comm_generation = session.generation;
}

inline OpEntry* find_op(Session& session, ThreadState& state, const at::RecordFunction& fn) {
  const char* name = fn.name();
  auto& known = state.ops[(reinterpret_cast<uint64_t>(name) >> 4) % state.ops.size()];
  if (known.name == name && known.entry->name == name) return known.entry;
  OpEntry* entry = session.ops.find(fn, session.tables, state.error);
  if (entry->stable) known = {name, entry};
  return entry;
}

inline std::unique_ptr<at::ObserverContext> start_work(Session& session, ThreadState& state,
                                                       const at::RecordFunction& fn) {
  const auto* info = static_cast<const CommInfo*>(c10::ThreadLocalDebugInfo::get(kCommInfo));
  if (info == nullptr || info->generation != session.generation) return nullptr;
  auto context = std::make_unique<WorkContext>();
  context->generation = session.generation;
  context->work.comm_id = info->id;
  context->work.op = session.ops.find(fn, session.tables, state.error)->id;
  if (state.inside == 0) {
    state.muted = true;
    state.has_comm = false;
    context->worker = &state;
  }
  context->work.start_ns = now_ns();
  return context;
}

// Where an event belongs: what was said on its thread, and what autograd knows of it.
inline void set_place(Event& event, const ThreadState& state, const ThreadSlot& slot, const at::RecordFunction& fn) {
  event.label = slot.label;
  event.context = slot.context;
  event.sequence = fn.seqNr();
  event.backward_sequence = -1;
  if (state.backward.empty() && state.engine_labels.empty()) return;
  // A label from around the backward pass says nothing of what runs in it; one set inside (recomputation) does.
  if (!state.engine_labels.empty() && state.engine_labels.back() == slot.label) event.label = 0;
  // The engine's own work on what a node gave (sums to the right shape, additions of gradients) is that node's.
  const auto& node = state.backward.empty() ? state.engine_node : state.backward.back();
  event.flags |= kInBackward;
  event.backward_sequence = node.sequence;
  event.fwd_thread = node.fwd_thread;
}

// Begins the record of an operator, or of a communication.
inline void open_leaf(Session& session, ThreadState& state, const ThreadSlot& slot, const OpEntry& op,
                      const at::RecordFunction& fn, Frame frame) {
  const auto inputs = fn.inputs();
  state.open = Event{};
  auto& event = state.open;
  event.op = op.id;
  set_place(event, state, slot, fn);
  state.open_refs.clear();
  state.scratch_refs.clear();
  for (size_t i = 0; i < inputs.size(); ++i) {
    uint16_t element = 0;
    add_refs(session, state, state.open_refs, inputs[i], static_cast<uint16_t>(i), element, true);
  }
  event.num_inputs = static_cast<uint32_t>(state.open_refs.size());
  state.has_comm = false;
  if (op.kind == OpClass::kComm) open_comm(session, state, op, inputs);
  state.inside = 1;
  state.frames.push_back(frame);
  event.start_ns = now_ns();
}

// Whether a communication runs inside an operator that is none itself (a library's, whose kernel communicates).
inline bool is_inner_comm(const ThreadState& state, const at::RecordFunction& fn) {
  return state.inside > 0 && !state.has_comm && !state.muted && std::strncmp(fn.name(), "c10d::", 6) == 0;
}

inline std::unique_ptr<at::ObserverContext> start(Session& session, ThreadState& state, const ThreadSlot& slot,
                                                  const at::RecordFunction& fn) {
  const auto scope = fn.scope();
  if (scope == at::RecordScope::USER_SCOPE) {
    // A backend announces the work of the communication in whose name it runs; other user scopes pass.
    return c10::ThreadLocalDebugInfo::get(kCommInfo) == nullptr ? nullptr : start_work(session, state, fn);
  }
  // A backend's worker has a Python thread state only while a callback of the communication's future runs on it, and
  // that is the program's.
  if (state.inside > 0 || (state.muted && PyGILState_GetThisThreadState() == nullptr)) {
    if (is_inner_comm(state, fn) && find_op(session, state, fn)->kind == OpClass::kComm) {
      // Ranks meet in it whatever it is inside of: the operator around it waits.
      state.waiting.push_back({state.open, std::move(state.open_refs), state.inside});
      open_leaf(session, state, slot, *find_op(session, state, fn), fn, Frame::kInnerComm);
      return nullptr;
    }
    ++state.inside;
    state.frames.push_back(Frame::kInside);
    return nullptr;
  }
  if (scope == at::RecordScope::BACKWARD_FUNCTION) {
    state.backward.push_back({fn.seqNr(), fn.forwardThreadId()});
    state.frames.push_back(Frame::kBackward);
    return nullptr;
  }
  OpEntry* op = find_op(session, state, fn);
  switch (op->kind) {
    case OpClass::kTransparent:
      state.frames.push_back(Frame::kTransparent);
      return nullptr;
    case OpClass::kEngine:
      state.engine_labels.push_back(slot.label);
      state.engine_node = {-1, 0};
      state.frames.push_back(Frame::kEngine);
      return nullptr;
    case OpClass::kFunction: {
      state.frames.push_back(Frame::kTransparent);
      if (fn.seqNr() >= 0) {
        Event event{};
        event.start_ns = event.end_ns = now_ns();
        event.op = op->id;
        set_place(event, state, slot, fn);
        event.flags |= kRange;
        event.first_ref = state.refs.count();
        if (!state.events.append(&event, sizeof(event), state.error)) switch_off(state.error);
      }
      return nullptr;
    }
    case OpClass::kLeaf:
    case OpClass::kComm:
      break;
  }
  const auto inputs = fn.inputs();
  if (answered_elsewhere(inputs)) {
    state.frames.push_back(Frame::kTransparent);
    return nullptr;
  }
  open_leaf(session, state, slot, *op, fn, Frame::kLeaf);
  return nullptr;
}

inline void close_comm(ThreadSlot& slot) {
  if (slot.comm_generation == 0) return;
  c10::ThreadLocalDebugInfo::_pop(kCommInfo);
  slot.comm_generation = 0;
}

inline void end_leaf(Session& session, ThreadState& state, const at::RecordFunction& fn) {
  auto& event = state.open;
  event.end_ns = now_ns();
  if (state.has_comm) close_comm(*this_slot);
  const auto& outputs = fn.outputs();
  for (size_t i = 0; i < outputs.size(); ++i) {
    uint16_t element = 0;
    add_refs(session, state, state.open_refs, outputs[i], static_cast<uint16_t>(i), element, false);
  }
  state.open_refs.insert(state.open_refs.end(), state.scratch_refs.begin(), state.scratch_refs.end());
  event.num_outputs = static_cast<uint32_t>(state.open_refs.size()) - event.num_inputs;
  if (outputs.empty() && fn.num_outputs() > 0) event.flags |= kFailed;
  event.first_ref = state.refs.count();
  bool written = true;
  if (state.has_comm) {
    written = state.comms.append(&state.open_comm, sizeof(Comm), state.error);
    event.comm = static_cast<uint32_t>(state.comms.count());
  }
  const size_t ref_bytes = state.open_refs.size() * sizeof(Ref);
  if (ref_bytes > 0) written = written && state.refs.append(state.open_refs.data(), ref_bytes, state.error);
  written = written && state.events.append(&event, sizeof(event), state.error);
  if (!written || !state.error.empty()) switch_off(state.error);  // an event whose names are lost is no event
}

inline std::unique_ptr<at::ObserverContext> on_start(const at::RecordFunction& fn) {
  ThreadSlot* slot = thread_slot();
  const SessionHold hold(slot);
  Session* session = hold.get();
  if (session == nullptr) return nullptr;
  try {
    return start(*session, *thread_state(session, *slot), *slot, fn);
  } catch (const std::exception& failure) {
    switch_off(failure.what());
    return nullptr;
  }
}

inline void end_work(Session& session, ThreadState& state, WorkContext& context) {
  if (context.generation != session.generation) return;
  context.work.end_ns = now_ns();
  if (context.worker == &state) state.muted = false;
  if (!state.works.append(&context.work, sizeof(Work), state.error)) switch_off(state.error);
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
        for (const auto& output : fn.outputs()) {
          add_refs(session, state, state.scratch_refs, output, kScratchArg, element, false);
        }
      }
      return;
    case Frame::kBackward:
      state.engine_node = state.backward.back();
      state.backward.pop_back();
      return;
    case Frame::kEngine:
      state.engine_labels.pop_back();
      return;
    case Frame::kLeaf:
      state.inside = 0;
      end_leaf(session, state, fn);
      state.has_comm = false;
      return;
    case Frame::kInnerComm: {
      end_leaf(session, state, fn);
      state.has_comm = false;
      auto& outer = state.waiting.back();
      state.open = outer.open;
      state.open_refs = std::move(outer.refs);
      state.inside = outer.inside;
      state.waiting.pop_back();
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
  } catch (const std::exception& failure) {
    switch_off(failure.what());
  }
}

}  // namespace truedag
