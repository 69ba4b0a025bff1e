#include "common/errors.h"

#include <gtest/gtest.h>

#include <string>
#include <type_traits>

namespace lora_serve {
namespace {

// bindings/bind_errors.cc translates the most derived class first; these are the only shared bases.
static_assert(std::is_base_of_v<std::runtime_error, LoraServeError>);
static_assert(std::is_base_of_v<NotFoundError, AdapterNotFoundError>);
static_assert(std::is_base_of_v<NotFoundError, RequestNotFoundError>);
static_assert(!std::is_base_of_v<AdapterNotFoundError, RequestNotFoundError>);
static_assert(!std::is_base_of_v<InvalidArgumentError, CapacityError>);

TEST(ErrorsTest, KeepTheirMessageThroughTheBaseClass) {
  try {
    throw AdapterNotFoundError("adapter 7 is unknown");
  } catch (const LoraServeError& error) {
    EXPECT_EQ(std::string(error.what()), "adapter 7 is unknown");
  }
}

template <typename Error>
class LoraServeErrorTest : public testing::Test {};
using Errors = testing::Types<InvalidArgumentError, NotFoundError, AdapterNotFoundError,
                              RequestNotFoundError, CapacityError, InternalError>;
TYPED_TEST_SUITE(LoraServeErrorTest, Errors);

TYPED_TEST(LoraServeErrorTest, IsCaughtAsTheBaseOfAll) {
  EXPECT_THROW(throw TypeParam("message"), LoraServeError);
}

}  // namespace
}  // namespace lora_serve
