/* The Python module `clipkit.pixels.jpeg_crop`; its types and documentation are in jpeg_crop.pyi. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include "jpeg_crop.h"

#include <stdlib.h>

/* More than this is given back after a crop. */
#define KEPT_BYTES (64u << 20)

typedef struct {
    Frame frame;
    Memory memory;
} Workplace;

/* What the last crop worked in, for the next; the interpreter's lock guards it. A thread that finds none makes one. */
static Workplace *spare;

static bool has_avx2(void) {
#if defined(__x86_64__) && defined(__GNUC__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
#else
    return false;
#endif
}

static void leave(Workplace *place) {
    if (spare) {
        free(place->memory.start);
        free(place);
        return;
    }
    if (place->memory.size > KEPT_BYTES) {
        free(place->memory.start);
        place->memory = (Memory){NULL, 0};
    }
    spare = place;
}

static PyObject *crop(PyObject *module, PyObject *arguments) {
    (void)module;
    Py_buffer data, out;
    Box box;
    int pixels, plain = 0;
    if (!PyArg_ParseTuple(arguments, "y*(dddd)iw*|p:crop", &data, &box.top, &box.left, &box.height, &box.width, &pixels,
                          &out, &plain))
        return NULL;
    Workplace *place = spare ? spare : calloc(1, sizeof *place);
    spare = NULL;
    bool done = false;
    if (pixels < 1 || pixels > 1 << 14 || out.len != (Py_ssize_t)3 * pixels * pixels) {
        PyErr_Format(PyExc_ValueError, "out has %zd bytes, not 3 * %d * %d", out.len, pixels, pixels);
    } else if (!place) {
        PyErr_NoMemory();
    } else {
        Py_BEGIN_ALLOW_THREADS;
        if (read_headers(&place->frame, data.buf, (size_t)data.len)) {
#if defined(__x86_64__) && defined(__GNUC__)
            if (!plain && has_avx2())
                done = crop_avx2(&place->frame, data.buf, (size_t)data.len, box, pixels, out.buf, &place->memory);
            else
#endif
                done = crop_plain(&place->frame, data.buf, (size_t)data.len, box, pixels, out.buf, &place->memory);
        }
        Py_END_ALLOW_THREADS;
    }
    if (place) leave(place);
    PyBuffer_Release(&data);
    PyBuffer_Release(&out);
    return PyErr_Occurred() ? NULL : PyBool_FromLong(done);
}

static PyMethodDef methods[] = {{"crop", crop, METH_VARARGS, NULL}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "jpeg_crop", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_jpeg_crop(void) {
    make_standard_tables();
    return PyModule_Create(&definition);
}
