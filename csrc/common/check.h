#pragma once

#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <string>

#include "common/errors.h"

namespace lora_serve::internal {

template <typename... Values>
[[nodiscard]] std::string FormatCheck(const char* file, int line, const char* condition,
                                      const Values&... values) {
  std::ostringstream os;
  os << file << ':' << line << ": check failed: " << condition;
  if constexpr (sizeof...(values) > 0) {
    os << " (";
    ((os << values), ...);
    os << ')';
  }
  return os.str();
}

}  // namespace lora_serve::internal

/// Throws InternalError when `condition` is false, always. Further arguments are printed one after
/// another: LS_CHECK(a == b, "a=", a, " b=", b).
#define LS_CHECK(condition, ...)                                             \
  do {                                                                       \
    if (!(condition)) [[unlikely]] {                                         \
      throw ::lora_serve::InternalError(::lora_serve::internal::FormatCheck( \
          __FILE__, __LINE__, #condition __VA_OPT__(, ) __VA_ARGS__));       \
    }                                                                        \
  } while (false)

/// Prints and aborts when `condition` is false, always. For destructors and noexcept code, which
/// cannot throw.
#define LS_FATAL(condition, ...)                                                            \
  do {                                                                                      \
    if (!(condition)) [[unlikely]] {                                                        \
      std::fputs(::lora_serve::internal::FormatCheck(__FILE__, __LINE__,                    \
                                                     #condition __VA_OPT__(, ) __VA_ARGS__) \
                     .c_str(),                                                              \
                 stderr);                                                                   \
      std::fputc('\n', stderr);                                                             \
      std::abort();                                                                         \
    }                                                                                       \
  } while (false)

/// LS_CHECK in debug and sanitizer builds (LS_DEBUG_CHECKS), nothing otherwise.
#ifdef LS_DEBUG_CHECKS
#define LS_DCHECK(condition, ...) LS_CHECK(condition __VA_OPT__(, ) __VA_ARGS__)
#else
#define LS_DCHECK(condition, ...) \
  do {                            \
  } while (false && (condition))
#endif
