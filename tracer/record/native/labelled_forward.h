// A module's `forward` while it is watched: sets the thread's label, calls what was there, and sets the label back. As an
// attribute of the module it costs a call next to nothing; a hook would take every call off the fast path of nn.Module.
// To everybody who looks at it (inspect.signature, copy, pickle) it is what it stands for.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include "slots.h"

namespace truedag {

struct LabelledForward {
  PyObject_HEAD
  vectorcallfunc vectorcall;
  PyObject* forward;
  uint32_t label;
};

inline LabelledForward* as_labelled(PyObject* self) { return reinterpret_cast<LabelledForward*>(self); }

inline PyObject* call_labelled(PyObject* self, PyObject* const* args, size_t count, PyObject* names) {
  auto* labelled = as_labelled(self);
  ThreadSlot* slot = recorded_slot();
  if (slot == nullptr) return PyObject_Vectorcall(labelled->forward, args, count, names);
  const uint64_t generation = slot->generation;
  const uint32_t before = slot->label;
  slot->label = labelled->label;
  PyObject* result = PyObject_Vectorcall(labelled->forward, args, count, names);
  if (slot->generation == generation) slot->label = before;
  return result;
}

inline int visit_labelled(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  Py_VISIT(as_labelled(self)->forward);
  return 0;
}

inline int clear_labelled(PyObject* self) {
  Py_CLEAR(as_labelled(self)->forward);
  return 0;
}

inline void free_labelled(PyObject* self) {
  PyObject_GC_UnTrack(self);
  clear_labelled(self);
  PyTypeObject* type = Py_TYPE(self);
  type->tp_free(self);
  Py_DECREF(type);
}

// What it does not have itself is asked of what it stands for.
inline PyObject* ask_labelled(PyObject* self, PyObject* name) {
  if (PyUnicode_CompareWithASCIIString(name, "__doc__") == 0) {
    return PyObject_GetAttr(as_labelled(self)->forward, name);
  }
  PyObject* own = PyObject_GenericGetAttr(self, name);
  if (own != nullptr || !PyErr_ExceptionMatches(PyExc_AttributeError) || as_labelled(self)->forward == nullptr) {
    return own;
  }
  PyErr_Clear();
  return PyObject_GetAttr(as_labelled(self)->forward, name);
}

// A copy, of the module or through a file, has the method that its class has.
inline PyObject* reduce_labelled(PyObject* self, PyObject*) {
  PyObject* forward = as_labelled(self)->forward;
  if (PyMethod_Check(forward)) {
    PyObject* builtins = PyEval_GetBuiltins();
    PyObject* getattr = PyDict_GetItemString(builtins, "getattr");
    return Py_BuildValue("O(Os)", getattr, PyMethod_GET_SELF(forward), "forward");
  }
  PyObject* module = PyImport_ImportModule("copy");
  if (module == nullptr) return nullptr;
  PyObject* copy = PyObject_GetAttrString(module, "copy");
  Py_DECREF(module);
  if (copy == nullptr) return nullptr;
  return Py_BuildValue("N(O)", copy, forward);
}

inline PyMemberDef labelled_members[] = {
    {"__wrapped__", T_OBJECT, offsetof(LabelledForward, forward), READONLY, nullptr},
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(LabelledForward, vectorcall), READONLY, nullptr},
    {nullptr, 0, 0, 0, nullptr},
};
inline PyMethodDef labelled_methods[] = {
    {"__reduce__", reduce_labelled, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};
inline PyType_Slot labelled_slots[] = {
    {Py_tp_call, reinterpret_cast<void*>(&PyVectorcall_Call)},
    {Py_tp_traverse, reinterpret_cast<void*>(&visit_labelled)},
    {Py_tp_clear, reinterpret_cast<void*>(&clear_labelled)},
    {Py_tp_dealloc, reinterpret_cast<void*>(&free_labelled)},
    {Py_tp_getattro, reinterpret_cast<void*>(&ask_labelled)},
    {Py_tp_members, labelled_members},
    {Py_tp_methods, labelled_methods},
    {0, nullptr},
};
inline PyType_Spec labelled_spec = {
    "truedag_recorder.LabelledForward", sizeof(LabelledForward), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    labelled_slots};
inline PyTypeObject* labelled_type = nullptr;

// label_forward(forward, label): a callable that calls `forward` under the label.
inline PyObject* py_label_forward(PyObject*, PyObject* args) {
  PyObject* forward = nullptr;
  unsigned int label = 0;
  if (!PyArg_ParseTuple(args, "OI", &forward, &label)) return nullptr;
  if (labelled_type == nullptr) {
    labelled_type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&labelled_spec));
    if (labelled_type == nullptr) return nullptr;
  }
  auto* labelled = as_labelled(labelled_type->tp_alloc(labelled_type, 0));
  if (labelled == nullptr) return nullptr;
  labelled->vectorcall = &call_labelled;
  labelled->forward = Py_NewRef(forward);
  labelled->label = label;
  return reinterpret_cast<PyObject*>(labelled);
}

}  // namespace truedag
