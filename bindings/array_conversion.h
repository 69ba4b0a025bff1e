#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "common/errors.h"

namespace lora_serve::bindings {

/// Copies a one-dimensional array-like of integers (or booleans) into a vector. Nothing is ever
/// rounded or wrapped: other kinds, shapes and values outside `T` are refused. Throws:
/// InvalidArgumentError naming `field`.
template <typename T>
std::vector<T> ToVector(const pybind11::handle& values, const std::string& field) {
  namespace py = pybind11;
  const auto refuse = [&field](const std::string& found) {
    throw InvalidArgumentError(field + " has " + found +
                               "; expected a flat list or array of integers from " +
                               std::to_string(std::numeric_limits<T>::min()) + " to " +
                               std::to_string(std::numeric_limits<T>::max()));
  };
  py::array array = py::array::ensure(values);
  if (!array) {
    PyErr_Clear();
    refuse("the type " + std::string(py::str(py::type::handle_of(values).attr("__name__"))));
  }
  if (array.ndim() != 1) refuse(std::to_string(array.ndim()) + " dimensions");
  if (array.size() == 0) return {};  // np.asarray([]) has the dtype float64
  const char kind = array.dtype().kind();
  if (kind != 'i' && kind != 'u' && kind != 'b')
    refuse("the dtype " + std::string(py::str(array.dtype())));
  if (py::isinstance<py::array_t<T>>(array)) {
    const auto typed = py::array_t<T, py::array::c_style | py::array::forcecast>::ensure(array);
    return std::vector<T>(typed.data(), typed.data() + typed.size());
  }
  if (kind == 'u' && array.itemsize() == 8) refuse("the dtype uint64");
  const auto wide =
      py::array_t<std::int64_t, py::array::c_style | py::array::forcecast>::ensure(array);
  std::vector<T> result;
  result.reserve(static_cast<std::size_t>(wide.size()));
  for (py::ssize_t index = 0; index < wide.size(); ++index) {
    const std::int64_t value = wide.data()[index];
    if (!std::in_range<T>(value))
      refuse("the value " + std::to_string(value) + " at " + std::to_string(index));
    result.push_back(static_cast<T>(value));
  }
  return result;
}

/// A read-only NumPy view of `values`, without a copy; `owner` is the Python object that holds
/// them, and stays alive as long as the view.
template <typename T>
pybind11::array ViewOf(std::span<const T> values, const pybind11::handle& owner) {
  namespace py = pybind11;
  py::array view(py::dtype::of<T>(), {static_cast<py::ssize_t>(values.size())}, {}, values.data(),
                 owner);
  py::detail::array_proxy(view.ptr())->flags &= ~py::detail::npy_api::NPY_ARRAY_WRITEABLE_;
  return view;
}

/// Throws: InvalidArgumentError naming `field`, if it is not a contiguous, flat array of `T`.
template <typename T>
void CheckEntries(const pybind11::array& array, const std::string& field, bool must_be_writable) {
  namespace py = pybind11;
  const bool is_flat =
      array.ndim() == 1 && py::isinstance<py::array_t<T, py::array::c_style>>(array);
  if (is_flat && (array.writeable() || !must_be_writable)) return;
  throw InvalidArgumentError(field + " has " + std::to_string(array.ndim()) +
                             " dimensions and the dtype " + std::string(py::str(array.dtype())) +
                             (array.writeable() ? "" : ", and is read-only") +
                             "; expected a contiguous, " + (must_be_writable ? "writable, " : "") +
                             "flat array of " + std::string(py::str(py::dtype::of<T>())));
}

/// The entries of an array that the core is to write into; nothing is converted.
/// Throws: InvalidArgumentError naming `field`.
template <typename T>
std::span<T> WritableEntries(pybind11::array& array, const std::string& field) {
  CheckEntries<T>(array, field, true);
  return {static_cast<T*>(array.mutable_data()), static_cast<std::size_t>(array.size())};
}

/// The entries of an array that the core is to read; nothing is converted.
/// Throws: InvalidArgumentError naming `field`.
template <typename T>
std::span<const T> Entries(const pybind11::array& array, const std::string& field) {
  CheckEntries<T>(array, field, false);
  return {static_cast<const T*>(array.data()), static_cast<std::size_t>(array.size())};
}

}  // namespace lora_serve::bindings
