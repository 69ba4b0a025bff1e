#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>

#include <exception>

#include "bindings.h"
#include "common/errors.h"

namespace lora_serve::bindings {
namespace {

namespace py = pybind11;

/// The Python namesakes of the core's errors, looked up once.
struct PythonErrors {
  py::object invalid_argument;
  py::object not_found;
  py::object adapter_not_found;
  py::object request_not_found;
  py::object capacity;
  py::object internal;
  py::object base;
};

PYBIND11_CONSTINIT py::gil_safe_call_once_and_store<PythonErrors> python_errors;

const PythonErrors& Errors() {
  return python_errors
      .call_once_and_store_result([] {
        const auto errors = py::module_::import("lora_serve.common.errors");
        return PythonErrors{.invalid_argument = errors.attr("InvalidArgumentError"),
                            .not_found = errors.attr("NotFoundError"),
                            .adapter_not_found = errors.attr("AdapterNotFoundError"),
                            .request_not_found = errors.attr("RequestNotFoundError"),
                            .capacity = errors.attr("CapacityError"),
                            .internal = errors.attr("InternalError"),
                            .base = errors.attr("LoraServeError")};
      })
      .get_stored();
}

void Raise(const py::object& type, const std::exception& error) {
  py::set_error(type, error.what());
}

/// The table of DESIGN's errors: most derived class first.
void Translate(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const InvalidArgumentError& error) {
    Raise(Errors().invalid_argument, error);
  } catch (const AdapterNotFoundError& error) {
    Raise(Errors().adapter_not_found, error);
  } catch (const RequestNotFoundError& error) {
    Raise(Errors().request_not_found, error);
  } catch (const NotFoundError& error) {
    Raise(Errors().not_found, error);
  } catch (const CapacityError& error) {
    Raise(Errors().capacity, error);
  } catch (const InternalError& error) {
    Raise(Errors().internal, error);
  } catch (const LoraServeError& error) {
    Raise(Errors().base, error);
  }
}

}  // namespace

void BindErrors(py::module_&) {
  static_cast<void>(Errors());  // a missing class fails the import, not the first error
  py::register_local_exception_translator(&Translate);
}

}  // namespace lora_serve::bindings
