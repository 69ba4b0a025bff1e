#pragma once

#include <stdexcept>
#include <string>

namespace lora_serve {

/// Base of all errors that the core throws. Messages name the subject, what came, what was expected
/// and what to do. `bindings/bind_errors.cc` translates each class to its Python namesake, once.
class LoraServeError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Bad configuration or request. Nothing was changed.
class InvalidArgumentError : public LoraServeError {
 public:
  using LoraServeError::LoraServeError;
};

/// An id that is not known, or that is closed to newcomers.
class NotFoundError : public LoraServeError {
 public:
  using LoraServeError::LoraServeError;
};

class AdapterNotFoundError : public NotFoundError {
 public:
  using NotFoundError::NotFoundError;
};

class RequestNotFoundError : public NotFoundError {
 public:
  using NotFoundError::NotFoundError;
};

/// The request can never fit. "No room in this step" is a return value, never this.
class CapacityError : public LoraServeError {
 public:
  using LoraServeError::LoraServeError;
};

/// A broken invariant: a bug in this project. The engine stops.
class InternalError : public LoraServeError {
 public:
  using LoraServeError::LoraServeError;
};

}  // namespace lora_serve
