// The observer: PyTorch's dispatcher calls on_start and on_end around every operator. Nested events of a thread are
// reduced to operators on the spot (DESIGN rule 2): a transparent event is walked through, the outermost other one is
// recorded, what runs inside that is not looked at.
#pragma once

#include <ATen/record_function.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <c10/util/ThreadLocalDebugInfo.h>

#include "session.h"

namespace truedag {

inline std::atomic<Session*> active_session{nullptr};
inline std::atomic<uint64_t> session_generation{0};

// A thread's place in the running session, and what Python said last on it.
struct ThreadSlot {
  uint64_t generation = 0;
  ThreadState* state = nullptr;
  uint32_t label = 0;
  uint32_t context = 0;
};
inline thread_local ThreadSlot slot;

// Why the recorder switched itself off; the program runs on.
inline void switch_off(const std::string& why) {
  Session* session = active_session.exchange(nullptr);
  if (session == nullptr) return;
  session->error = why;
  std::fprintf(stderr, "truedag: recording stopped, the program runs on: %s\n", why.c_str());
}

inline ThreadState* thread_state(Session* session) {
  if (slot.generation != session->generation) {
    slot.state = session->join();
    slot.generation = session->generation;
  }
  return slot.state;
}

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
  ThreadState* worker = nullptr;  // the backend's thread that runs it, whose own operators are the work's business
};

inline bool runs_python(const at::Tensor& tensor) {
  return tensor.defined() && tensor.key_set().has(c10::DispatchKey::Python);
}

inline void add_ref(Session& session, ThreadState& state, std::vector<Ref>& refs, const at::Tensor& tensor,
                    uint16_t arg, uint16_t element) {
  // A number that became a tensor on the way is a constant of the call, not data that flowed.
  if (!tensor.defined() || tensor.unsafeGetTensorImpl()->is_wrapped_number()) return;
  Ref ref{};
  ref.arg = arg;
  ref.element = element;
  const auto* impl = tensor.unsafeGetTensorImpl();
  if (impl->has_storage() && impl->layout() == c10::kStrided && !tensor.is_nested() &&
      !impl->has_symbolic_sizes_strides()) {
    const auto* storage = impl->unsafe_storage().unsafeGetStorageImpl();
    const void* data = const_cast<c10::StorageImpl*>(storage)->_mutable_data_ptr_no_checks().get();
    const uint64_t bytes = storage->nbytes();
    auto& known = state.storages[(reinterpret_cast<uint64_t>(storage) >> 5) % ThreadState::kCacheSize];
    if (known.impl != storage || known.data != data || known.bytes != bytes) {
      known = {storage, data, bytes, session.storages.find(storage, data, bytes, session.tables, session.error)};
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
      layout = {hash, session.layouts.find(hash, dtype, device, itemsize, sizes, strides, session.tables, session.error)};
    }
    ref.layout = layout.entry->id;
  }
  refs.push_back(ref);
}

inline void add_refs(Session& session, ThreadState& state, std::vector<Ref>& refs, const c10::IValue& value,
                     uint16_t arg, uint16_t& element) {
  if (value.isTensor()) {
    add_ref(session, state, refs, value.toTensor(), arg, element++);
  } else if (value.isList()) {
    for (const auto& item : value.toListRef()) {
      if (!item.isTensor() && !item.isList() && !item.isNone()) break;
      add_refs(session, state, refs, item, arg, element);
    }
  } else if (value.isTuple()) {
    for (const auto& item : value.toTupleRef().elements()) add_refs(session, state, refs, item, arg, element);
  }
}

// A tensor subclass (DTensor) or a dispatch mode answers this call in Python: the operators are what it calls.
inline bool answered_in_python(c10::ArrayRef<const c10::IValue> inputs) {
  if (c10::impl::TorchDispatchModeTLS::any_modes_set()) return true;
  for (const auto& value : inputs) {
    if (value.isTensor()) {
      if (runs_python(value.toTensor())) return true;
    } else if (value.isTensorList()) {
      for (const auto& item : value.toListRef()) {
        if (item.isTensor() && runs_python(item.toTensor())) return true;
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
    auto* entry = session.groups.find(*group, session.tables, session.error);
    comm.group = entry->id;
    comm.order = op.p2p ? entry->num_p2p++ : entry->num_collectives++;
  }
  state.open_comm = comm;
  state.has_comm = true;
  c10::ThreadLocalDebugInfo::_push(kCommInfo, std::make_shared<CommInfo>(session.generation, comm.id));
  state.debug_pushed = true;
}

inline OpEntry* find_op(Session& session, ThreadState& state, const at::RecordFunction& fn) {
  const char* name = fn.name();
  auto& known = state.ops[(reinterpret_cast<uint64_t>(name) >> 4) % state.ops.size()];
  if (known.name == name && known.entry->stable) return known.entry;
  OpEntry* entry = session.ops.find(fn, session.tables, session.error);
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
  context->work.op = session.ops.find(fn, session.tables, session.error)->id;
  if (state.inside == 0) {
    state.inside = 1;
    state.has_comm = false;
    context->worker = &state;
  }
  context->work.start_ns = now_ns();
  return context;
}

inline void push_frame(ThreadState& state, Frame frame) {
  if (state.depth < ThreadState::kMaxDepth) state.frames[state.depth] = frame;
  ++state.depth;
}

inline std::unique_ptr<at::ObserverContext> start(Session& session, ThreadState& state, const at::RecordFunction& fn) {
  const auto scope = fn.scope();
  if (scope == at::RecordScope::USER_SCOPE) {
    // A backend announces the work of the communication in whose name it runs; other user scopes pass.
    return c10::ThreadLocalDebugInfo::get(kCommInfo) == nullptr ? nullptr : start_work(session, state, fn);
  }
  if (state.inside > 0) {
    ++state.inside;
    push_frame(state, Frame::kInside);
    return nullptr;
  }
  if (scope == at::RecordScope::BACKWARD_FUNCTION) {
    state.backward.push_back({fn.seqNr(), fn.forwardThreadId()});
    push_frame(state, Frame::kBackward);
    return nullptr;
  }
  OpEntry* op = find_op(session, state, fn);
  switch (op->kind) {
    case OpClass::kTransparent:
      push_frame(state, Frame::kTransparent);
      return nullptr;
    case OpClass::kEngine:
      ++state.engine_depth;
      state.engine_node = {-1, 0};
      push_frame(state, Frame::kEngine);
      return nullptr;
    case OpClass::kFunction: {
      push_frame(state, Frame::kTransparent);
      if (fn.seqNr() >= 0 && state.engine_depth == 0) {
        Event event{};
        event.start_ns = event.end_ns = now_ns();
        event.sequence = fn.seqNr();
        event.op = op->id;
        event.label = slot.label;
        event.context = slot.context;
        event.flags = kRange;
        event.first_ref = state.refs.count();
        if (!state.events.append(&event, sizeof(event), session.error)) switch_off(session.error);
      }
      return nullptr;
    }
    case OpClass::kLeaf:
    case OpClass::kComm:
      break;
  }
  const auto inputs = fn.inputs();
  if (answered_in_python(inputs)) {
    push_frame(state, Frame::kTransparent);
    return nullptr;
  }
  state.open = Event{};
  auto& event = state.open;
  event.op = op->id;
  event.label = slot.label;
  event.context = slot.context;
  event.sequence = fn.seqNr();
  if (!state.backward.empty()) {
    event.flags |= kInBackward;
    event.sequence = state.backward.back().sequence;
    event.fwd_thread = state.backward.back().fwd_thread;
  } else if (state.engine_depth > 0) {
    // The engine's own work on what a node gave (sums to the right shape, additions of gradients) is that node's.
    event.flags |= kInBackward;
    event.sequence = state.engine_node.sequence;
    event.fwd_thread = state.engine_node.fwd_thread;
  }
  state.open_refs.clear();
  state.scratch_refs.clear();
  for (size_t i = 0; i < inputs.size(); ++i) {
    uint16_t element = 0;
    add_refs(session, state, state.open_refs, inputs[i], static_cast<uint16_t>(i), element);
  }
  event.num_inputs = static_cast<uint32_t>(state.open_refs.size());
  state.has_comm = false;
  if (op->kind == OpClass::kComm) open_comm(session, state, *op, inputs);
  state.inside = 1;
  push_frame(state, Frame::kLeaf);
  event.start_ns = now_ns();
  return nullptr;
}

inline void end_leaf(Session& session, ThreadState& state, const at::RecordFunction& fn) {
  auto& event = state.open;
  event.end_ns = now_ns();
  if (state.debug_pushed) {
    c10::ThreadLocalDebugInfo::_pop(kCommInfo);
    state.debug_pushed = false;
  }
  const auto& outputs = fn.outputs();
  for (size_t i = 0; i < outputs.size(); ++i) {
    uint16_t element = 0;
    add_refs(session, state, state.open_refs, outputs[i], static_cast<uint16_t>(i), element);
  }
  state.open_refs.insert(state.open_refs.end(), state.scratch_refs.begin(), state.scratch_refs.end());
  event.num_outputs = static_cast<uint32_t>(state.open_refs.size()) - event.num_inputs;
  if (outputs.empty() && fn.num_outputs() > 0) event.flags |= kFailed;
  event.first_ref = state.refs.count();
  bool written = true;
  if (state.has_comm) {
    written = state.comms.append(&state.open_comm, sizeof(Comm), session.error);
    event.comm = static_cast<uint32_t>(state.comms.count());
  }
  const size_t ref_bytes = state.open_refs.size() * sizeof(Ref);
  if (ref_bytes > 0) written = written && state.refs.append(state.open_refs.data(), ref_bytes, session.error);
  written = written && state.events.append(&event, sizeof(event), session.error);
  if (!written) switch_off(session.error);
}

inline std::unique_ptr<at::ObserverContext> on_start(const at::RecordFunction& fn) {
  Session* session = active_session.load(std::memory_order_acquire);
  if (session == nullptr) return nullptr;
  try {
    return start(*session, *thread_state(session), fn);
  } catch (const std::exception& failure) {
    switch_off(failure.what());
    return nullptr;
  }
}

inline void on_end(const at::RecordFunction& fn, at::ObserverContext* context) {
  Session* session = active_session.load(std::memory_order_acquire);
  if (session == nullptr) {
    if (slot.state != nullptr && slot.state->debug_pushed) {  // switched off inside a communication
      c10::ThreadLocalDebugInfo::_pop(kCommInfo);
      slot.state->debug_pushed = false;
    }
    return;
  }
  try {
    ThreadState& state = *thread_state(session);
    if (context != nullptr) {
      auto* work = static_cast<WorkContext*>(context);
      if (work->generation != session->generation) return;
      work->work.end_ns = now_ns();
      if (work->worker == &state) state.inside = 0;
      if (!state.works.append(&work->work, sizeof(Work), session->error)) switch_off(session->error);
      return;
    }
    if (fn.scope() == at::RecordScope::USER_SCOPE || state.depth == 0) return;  // began before this recording
    --state.depth;
    const Frame frame = state.depth < ThreadState::kMaxDepth ? state.frames[state.depth] : Frame::kInside;
    switch (frame) {
      case Frame::kTransparent:
        return;
      case Frame::kInside:
        --state.inside;
        if (state.has_comm) {
          uint16_t element = 0;
          for (const auto& output : fn.outputs()) {
            add_refs(*session, state, state.scratch_refs, output, kScratchArg, element);
          }
        }
        return;
      case Frame::kBackward:
        state.engine_node = state.backward.back();
        state.backward.pop_back();
        return;
      case Frame::kEngine:
        --state.engine_depth;
        return;
      case Frame::kLeaf:
        state.inside = 0;
        end_leaf(*session, state, fn);
        return;
    }
  } catch (const std::exception& failure) {
    switch_off(failure.what());
  }
}

}  // namespace truedag
