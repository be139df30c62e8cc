// The Python module: start and stop a recording, and say what Python knows (labels, contexts, names of tensors).
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <pthread.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "interceptor.h"
#include "regions.h"

namespace truedag {
namespace {

Session* current = nullptr;  // the running session; never freed at exit
bool is_stopping = false;    // it still is `current`, and takes nothing in any more
// Of operators, with their tensors; of backends' works.
using Callbacks = std::array<at::CallbackHandle, 2>;
constexpr Callbacks kNoCallbacks = {at::INVALID_CALLBACK_HANDLE, at::INVALID_CALLBACK_HANDLE};
Callbacks callbacks = kNoCallbacks;
Callbacks inherited_callbacks = kNoCallbacks;  // in a forked child, until the next start
bool forked = false;

PyObject* refuse(const std::string& why) {
  PyErr_SetString(PyExc_RuntimeError, why.c_str());
  return nullptr;
}

// What fails here must not reach Python as anything but an exception, or the end of the recording.
template <typename Body>
void survives(Body body) {
  try {
    body();
  } catch (const std::exception& error) {
    switch_off(error.what());
  }
}

Callbacks add_callbacks() {
  return {at::addGlobalCallback(at::RecordFunctionCallback(&on_start, &on_end)
                                    .needsInputs(true)
                                    .needsOutputs(true)
                                    .scopes({at::RecordScope::FUNCTION})),
          at::addGlobalCallback(at::RecordFunctionCallback(&on_start, &on_end)
                                    .scopes({at::RecordScope::USER_SCOPE}))};
}

void remove_callbacks(Callbacks& handles) {
  for (const auto handle : handles) {
    if (handle != at::INVALID_CALLBACK_HANDLE) at::removeCallback(handle);
  }
  handles = kNoCallbacks;
}

// start(path, max_bytes=0, may_intercept=True): else operators are only observed.
PyObject* py_start(PyObject*, PyObject* args) {
  const char* path = nullptr;
  unsigned long long max_bytes = 0;
  int may_intercept = 1;
  if (!PyArg_ParseTuple(args, "s|Kp", &path, &max_bytes, &may_intercept)) return nullptr;
  if (current != nullptr) return refuse("a recording is running in this process already");
  remove_callbacks(inherited_callbacks);
  try {
    auto session = std::make_unique<Session>();
    session->file.open(path, max_bytes);
    session->generation = session_generation.fetch_add(1) + 1;
    failure.fill(0);
    current = session.release();
  } catch (const std::exception& error) {
    return refuse(error.what());
  }
  forked = false;
  find_cpu_deleter();
  active_session.store(current, std::memory_order_seq_cst);
  survives([] { const Recorded here; });  // what this thread's first operator finds is there
  callbacks = add_callbacks();
  const bool is_alone = at::getStepCallbacks(at::RecordScope::FUNCTION).callbacks_.size() <= 1;
  num_listeners.store(is_alone ? 0 : 1);
  intercepts.store(may_intercept != 0 && stand_in_dispatcher());
  intercept_from_here();
  Py_RETURN_NONE;
}

// Returns (events recorded, why it switched itself off or "").
PyObject* py_stop(PyObject*, PyObject*) {
  if (forked) {
    forked = false;
    return Py_BuildValue("Ks", 0ULL, "this process was forked from the recorded one");
  }
  if (current == nullptr || is_stopping) return refuse("no recording is running");
  remove_callbacks(callbacks);
  observe_from_here();
  is_stopping = true;
  Session* session = current;
  uint64_t events = 0;
  // Without the GIL: a callback may wait for it, as may the threads of a process group that is taken down here.
  Py_BEGIN_ALLOW_THREADS;
  quiesce();
  for (const auto& thread : session->threads) events += thread->events.count();
  session->file.close();
  delete session;
  Py_END_ALLOW_THREADS;
  current = nullptr;
  is_stopping = false;
  return Py_BuildValue("Ks", static_cast<unsigned long long>(events), failure.data());
}

// write(kind, id, payload): an entry of the tables. Nothing happens where nothing is recorded, as in a forked child.
PyObject* py_write(PyObject*, PyObject* args) {
  unsigned int kind = 0;
  unsigned int id = 0;
  const char* payload = nullptr;
  Py_ssize_t size = 0;
  if (!PyArg_ParseTuple(args, "IIy#", &kind, &id, &payload, &size)) return nullptr;
  survives([&] {
    const SessionHold hold(thread_slot());
    if (Session* session = hold.get()) session->tables.write(static_cast<TableKind>(kind), id, std::string(payload, size));
  });
  Py_RETURN_NONE;
}

PyObject* py_set_label(PyObject*, PyObject* value) {
  const auto label = PyLong_AsUnsignedLong(value);
  if (PyErr_Occurred() != nullptr) return nullptr;
  uint32_t before = 0;
  survives([&] {
    const Recorded here;
    if (!here) return;
    note_nodes(*here.session, *here.state, *here.slot);
    before = std::exchange(here.slot->label, static_cast<uint32_t>(label));
  });
  return PyLong_FromUnsignedLong(before);
}

PyObject* py_set_context(PyObject*, PyObject* value) {
  const auto context = PyLong_AsUnsignedLong(value);
  if (PyErr_Occurred() != nullptr) return nullptr;
  survives([&] {
    const Recorded here;
    if (!here) return;
    note_nodes(*here.session, *here.state, *here.slot);
    here.slot->context = static_cast<uint32_t>(context);
  });
  Py_RETURN_NONE;
}

// observe(): intercept no more in this recording.
PyObject* py_observe(PyObject*, PyObject*) {
  intercepts.store(false);
  observe_from_here();
  Py_RETURN_NONE;
}

// listen(whether): somebody else begins, or ends, to observe operators.
PyObject* py_listen(PyObject*, PyObject* value) {
  const int begins = PyObject_IsTrue(value);
  if (begins < 0) return nullptr;
  const int listeners = std::max(num_listeners.load() + (begins != 0 ? 1 : -1), 0);
  num_listeners.store(listeners);
  if (is_intercepted()) at::enableRecordFunction(listeners > 0);
  Py_RETURN_NONE;
}

// where(tensor) -> (storage, layout, offset in bytes), all 0 for memory that cannot be named.
PyObject* py_where(PyObject*, PyObject* object) {
  if (!THPVariable_Check(object)) {
    PyErr_SetString(PyExc_TypeError, "where() takes a tensor");
    return nullptr;
  }
  Tensor place{};
  const auto* impl = THPVariable_Unpack(object).unsafeGetTensorImpl();
  survives([&] {
    const Recorded here;
    if (!here || !has_place(impl)) return;
    place = find_place(*here.session, *here.state, impl, find_layout(*here.session, *here.state, impl), true);
  });
  return Py_BuildValue("IIL", place.storage, place.layout, static_cast<long long>(place.offset_bytes));
}

// What `Work.wait` is while it is watched: the method itself, and what it was before.
PyObject* watched_wait = nullptr;
PyObject* original_wait = nullptr;
PyObject* watched_type = nullptr;
bool is_wrapped = false;  // somebody put a method of their own around ours, which stays within it

// Waits, and writes down from when to when. Also without a recording, should somebody have kept hold of it.
PyObject* timed_wait(PyObject* self, PyObject* const* args, Py_ssize_t count, PyObject* names) {
  const Py_ssize_t total = count + (names == nullptr ? 0 : PyTuple_GET_SIZE(names));
  std::vector<PyObject*> all(static_cast<size_t>(total) + 1, self);
  std::copy(args, args + total, all.begin() + 1);
  Wait wait{};
  wait.start_ns = now_ns();
  PyObject* original = Py_NewRef(original_wait);
  PyObject* result = PyObject_Vectorcall(original, all.data(), static_cast<size_t>(count) + 1, names);
  wait.end_ns = now_ns();
  Py_DECREF(original);
  survives([&] {
    const Recorded here;
    if (!here) return;
    const auto work = pybind11::handle(self).cast<c10::intrusive_ptr<c10d::Work>>();
    wait.comm_id = here.session->recent.find(work.get(), nullptr);
    here.state->waits.append(&wait, sizeof(wait));
  });
  return result;
}

PyMethodDef timed_wait_method = {"wait", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&timed_wait)),
                                 METH_FASTCALL | METH_KEYWORDS, "Wait for a communication; truedag is recording."};

// watch_waits(Work): tell from when to when the program's threads wait for works, until unwatch_waits().
PyObject* py_watch_waits(PyObject*, PyObject* type) {
  if (!PyType_Check(type)) return refuse("watch_waits() takes the class Work");
  if (watched_type != nullptr) Py_RETURN_NONE;
  if (watched_wait == nullptr) {  // one for all recordings
    watched_wait = PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(type), &timed_wait_method);
    if (watched_wait == nullptr) return nullptr;
  }
  PyObject* before = PyObject_GetAttrString(type, "wait");
  if (before == nullptr) return nullptr;
  if (before == original_wait) {
    Py_DECREF(before);
    is_wrapped = false;
  } else if (is_wrapped) {
    Py_DECREF(before);
    Py_RETURN_NONE;
  } else {
    Py_XDECREF(std::exchange(original_wait, before));
  }
  if (PyObject_SetAttrString(type, "wait", watched_wait) != 0) return nullptr;
  watched_type = Py_NewRef(type);
  Py_RETURN_NONE;
}

PyObject* py_unwatch_waits(PyObject*, PyObject*) {
  if (watched_type == nullptr) Py_RETURN_NONE;
  PyObject* type = watched_type;
  watched_type = nullptr;
  PyObject* present = PyObject_GetAttrString(type, "wait");
  is_wrapped = present != watched_wait;
  const int failed = is_wrapped ? 0 : PyObject_SetAttrString(type, "wait", original_wait);
  Py_XDECREF(present);
  Py_DECREF(type);
  if (failed != 0) return nullptr;
  Py_RETURN_NONE;
}

// open_region(name, overload, schema, inputs, written, may_reuse) -> whether close_region() is to follow on this thread.
PyObject* py_open_region(PyObject*, PyObject* args) {
  const char *name = nullptr, *overload = nullptr, *schema = nullptr;
  PyObject *inputs = nullptr, *written = nullptr;
  int may_reuse = 0;
  if (!PyArg_ParseTuple(args, "sssOO!p", &name, &overload, &schema, &inputs, &PyTuple_Type, &written, &may_reuse)) {
    return nullptr;
  }
  PyObject* items = PySequence_Fast(inputs, "a region's inputs are a sequence");
  if (items == nullptr) return nullptr;
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(items);
  std::vector<bool> is_written(count);
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(written); ++i) {
    const Py_ssize_t place = PyLong_AsSsize_t(PyTuple_GET_ITEM(written, i));
    if (place >= 0 && place < count) is_written[place] = true;
  }
  Tensors read, changed;
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* item = PySequence_Fast_GET_ITEM(items, i);
    if (THPVariable_Check(item)) (is_written[i] ? changed : read).push_back(THPVariable_Unpack(item));
  }
  Py_DECREF(items);
  if (PyErr_Occurred() != nullptr) return nullptr;
  bool is_open = false;
  survives([&] {
    const Recorded here;
    is_open = here && open_region(*here.session, *here.state, *here.slot, name, overload, schema, read, changed,
                                  may_reuse != 0);
  });
  return PyBool_FromLong(is_open);
}

// close_region(results, or None where it failed)
PyObject* py_close_region(PyObject*, PyObject* results) {
  Tensors tensors;
  if (results != Py_None) {
    PyObject* items = PySequence_Fast(results, "a region's results are a sequence");
    if (items == nullptr) return nullptr;
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(items); ++i) {
      PyObject* item = PySequence_Fast_GET_ITEM(items, i);
      if (THPVariable_Check(item)) tensors.push_back(THPVariable_Unpack(item));
    }
    Py_DECREF(items);
  }
  survives([&] {
    if (const Recorded here; here) {
      close_region(*here.session, *here.state, results == Py_None ? nullptr : &tensors);
    }
  });
  Py_RETURN_NONE;
}

// sizes() -> bytes of each record, for the test that holds format.py to this file.
PyObject* py_sizes(PyObject*, PyObject*) {
  return Py_BuildValue("{s:n,s:n,s:n,s:n,s:n,s:n,s:n,s:n,s:n,s:n,s:n}", "event", sizeof(Event), "ref", sizeof(Ref), "tensor",
                       sizeof(Tensor), "storage", sizeof(Storage), "comm", sizeof(Comm), "work", sizeof(Work), "free",
                       sizeof(Free), "wait", sizeof(Wait), "place", sizeof(Place), "chunk", sizeof(ChunkHeader), "file", kFileHeaderBytes);
}

PyMethodDef methods[] = {
    {"start", py_start, METH_VARARGS, "start(path, max_bytes=0, may_intercept=True): record this process into a new file."},
    {"stop", py_stop, METH_NOARGS, "stop() -> (number of events, why the recorder switched itself off or '')."},
    {"write", py_write, METH_VARARGS, "write(kind, id, payload): add an entry to the tables."},
    {"set_label", py_set_label, METH_O, "set_label(id) -> the label before, on this thread."},
    {"set_context", py_set_context, METH_O, "set_context(id), on this thread."},
    {"observe", py_observe, METH_NOARGS, "observe(): intercept no more, only observe."},
    {"listen", py_listen, METH_O, "listen(whether): somebody else begins, or ends, to observe operators."},
    {"where", py_where, METH_O, "where(tensor) -> (storage, layout, offset in bytes)."},
    {"watch_waits", py_watch_waits, METH_O, "watch_waits(Work): record when the program waits for works."},
    {"unwatch_waits", py_unwatch_waits, METH_NOARGS, "unwatch_waits(): leave Work as it was."},
    {"open_region", py_open_region, METH_VARARGS,
     "open_region(name, overload, schema, inputs, written, may_reuse) -> whether close_region() is to follow."},
    {"close_region", py_close_region, METH_O, "close_region(results, or None where it failed)."},
    {"sizes", py_sizes, METH_NOARGS, "sizes() -> bytes of each kind of record."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "truedag_recorder", nullptr, -1, methods,
                      nullptr, nullptr, nullptr, nullptr};

// A forked child has neither the mapping nor the parent's threads: it records nothing, and must not clean up either.
// What a thread that is not there any more may have locked is made anew.
void forget_in_child() {
  if (current != nullptr && !is_stopping) forked = true;
  is_stopping = false;
  active_session.store(nullptr);
  inherited_callbacks = std::exchange(callbacks, kNoCallbacks);
  current = nullptr;
  operators = new Operators();
  slot_list = new SlotList();
  if (this_slot != nullptr) {
    this_slot->busy.store(false);
    slot_list->slots.push_back(this_slot);
  }
}

}  // namespace
}  // namespace truedag

PyMODINIT_FUNC PyInit_truedag_recorder() {
  pthread_atfork(nullptr, nullptr, &truedag::forget_in_child);
  // For good: nothing of the recorder is taken down at exit, when other threads may still run operators.
  new c10::RegistrationHandleRAII(
      c10::Dispatcher::singleton().addRegistrationListener(std::make_unique<truedag::GoneOperators>()));
  return PyModule_Create(&truedag::module);
}
