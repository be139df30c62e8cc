// The Python module: start and stop a recording, and say what Python knows (labels, contexts, names of tensors).
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <pthread.h>
#include <torch/csrc/autograd/python_variable.h>

#include "observer.h"

namespace truedag {
namespace {

Session* current = nullptr;  // the running session, or the last one until the next start; never freed at exit
at::CallbackHandle callback = at::INVALID_CALLBACK_HANDLE;
at::CallbackHandle inherited_callback = at::INVALID_CALLBACK_HANDLE;  // in a forked child, until the next start
bool forked = false;

PyObject* refuse(const std::string& why) {
  PyErr_SetString(PyExc_RuntimeError, why.c_str());
  return nullptr;
}

Session* running() { return callback == at::INVALID_CALLBACK_HANDLE ? nullptr : current; }

PyObject* py_start(PyObject*, PyObject* args) {
  const char* path = nullptr;
  if (!PyArg_ParseTuple(args, "s", &path)) return nullptr;
  if (callback != at::INVALID_CALLBACK_HANDLE) return refuse("a recording is running in this process already");
  if (inherited_callback != at::INVALID_CALLBACK_HANDLE) {
    at::removeCallback(inherited_callback);
    inherited_callback = at::INVALID_CALLBACK_HANDLE;
  }
  if (current != nullptr) {
    current->file.unmap();
    delete current;
    current = nullptr;
  }
  auto session = std::make_unique<Session>();
  std::string error;
  if (!session->file.open(path, error)) return refuse(error);
  session->generation = session_generation.fetch_add(1) + 1;
  current = session.release();
  forked = false;
  active_session.store(current, std::memory_order_seq_cst);
  callback = at::addGlobalCallback(at::RecordFunctionCallback(&on_start, &on_end)
                                       .needsInputs(true)
                                       .needsOutputs(true)
                                       .scopes({at::RecordScope::FUNCTION, at::RecordScope::BACKWARD_FUNCTION,
                                                at::RecordScope::USER_SCOPE}));
  Py_RETURN_NONE;
}

// Returns (events recorded, why it switched itself off or "").
PyObject* py_stop(PyObject*, PyObject*) {
  if (forked) {
    forked = false;
    return Py_BuildValue("Ks", 0ULL, "this process was forked from the recorded one");
  }
  Session* session = running();
  if (session == nullptr) return refuse("no recording is running");
  at::removeCallback(callback);
  callback = at::INVALID_CALLBACK_HANDLE;
  quiesce();
  uint64_t events = 0;
  for (const auto& thread : session->threads) events += thread->events.count();
  session->file.close();
  return Py_BuildValue("Ks", static_cast<unsigned long long>(events), session->failure.c_str());
}

// write(kind, id, payload): an entry of the tables. Nothing happens where nothing is recorded, as in a forked child.
PyObject* py_write(PyObject*, PyObject* args) {
  unsigned int kind = 0;
  unsigned int id = 0;
  const char* payload = nullptr;
  Py_ssize_t size = 0;
  if (!PyArg_ParseTuple(args, "IIy#", &kind, &id, &payload, &size)) return nullptr;
  Session* session = running();
  if (session != nullptr && active_session.load() == session &&
      !session->tables.write(static_cast<TableKind>(kind), id, std::string(payload, size), session->error)) {
    switch_off(session->error);
  }
  Py_RETURN_NONE;
}

// This thread's slot with its state of the running session; null where nothing is recorded.
ThreadSlot* recorded_slot() {
  Session* session = active_session.load();
  ThreadSlot* slot = thread_slot();
  if (session == nullptr || slot == nullptr) return nullptr;
  thread_state(session, *slot);
  return slot;
}

PyObject* py_set_label(PyObject*, PyObject* value) {
  const auto label = PyLong_AsUnsignedLong(value);
  if (PyErr_Occurred() != nullptr) return nullptr;
  ThreadSlot* slot = recorded_slot();
  if (slot == nullptr) return PyLong_FromLong(0);
  const uint32_t before = slot->label;
  slot->label = static_cast<uint32_t>(label);
  return PyLong_FromUnsignedLong(before);
}

PyObject* py_set_context(PyObject*, PyObject* value) {
  const auto context = PyLong_AsUnsignedLong(value);
  if (PyErr_Occurred() != nullptr) return nullptr;
  if (ThreadSlot* slot = recorded_slot()) slot->context = static_cast<uint32_t>(context);
  Py_RETURN_NONE;
}

// where(tensor) -> (storage, layout, offset in bytes), all 0 for memory that cannot be named.
PyObject* py_where(PyObject*, PyObject* object) {
  if (!THPVariable_Check(object)) {
    PyErr_SetString(PyExc_TypeError, "where() takes a tensor");
    return nullptr;
  }
  std::vector<Ref> refs;
  if (ThreadSlot* slot = recorded_slot()) {
    add_ref(*active_session.load(), *slot->state, refs, THPVariable_Unpack(object), 0, 0, true);
  }
  const Ref ref = refs.empty() ? Ref{} : refs.front();
  return Py_BuildValue("IIL", ref.storage, ref.layout, static_cast<long long>(ref.offset_bytes));
}

// sizes() -> bytes of each record, for the test that holds format.py to this file.
PyObject* py_sizes(PyObject*, PyObject*) {
  return Py_BuildValue("{s:n,s:n,s:n,s:n,s:n,s:n}", "event", sizeof(Event), "ref", sizeof(Ref), "comm", sizeof(Comm),
                       "work", sizeof(Work), "chunk", sizeof(ChunkHeader), "file", kFileHeaderBytes);
}

PyMethodDef methods[] = {
    {"start", py_start, METH_VARARGS, "start(path): record this process into a new file."},
    {"stop", py_stop, METH_NOARGS, "stop() -> (number of events, why the recorder switched itself off or '')."},
    {"write", py_write, METH_VARARGS, "write(kind, id, payload): add an entry to the tables."},
    {"set_label", py_set_label, METH_O, "set_label(id) -> the label before, on this thread."},
    {"set_context", py_set_context, METH_O, "set_context(id), on this thread."},
    {"where", py_where, METH_O, "where(tensor) -> (storage, layout, offset in bytes)."},
    {"sizes", py_sizes, METH_NOARGS, "sizes() -> bytes of each kind of record."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "truedag_recorder", nullptr, -1, methods,
                      nullptr, nullptr, nullptr, nullptr};

// A forked child has neither the mapping nor the parent's threads: it records nothing, and must not clean up either.
void forget_in_child() {
  if (running() != nullptr) forked = true;
  active_session.store(nullptr);
  inherited_callback = callback;
  callback = at::INVALID_CALLBACK_HANDLE;
  current = nullptr;
  slot_list = new SlotList();  // of this thread alone; the parent's lock may be taken
  if (this_slot != nullptr) {
    this_slot->busy.store(false);
    slot_list->slots.push_back(this_slot);
  }
}

}  // namespace
}  // namespace truedag

PyMODINIT_FUNC PyInit_truedag_recorder() {
  pthread_atfork(nullptr, nullptr, &truedag::forget_in_child);
  return PyModule_Create(&truedag::module);
}
