#include "common/check.h"

#include <gtest/gtest.h>

#include <functional>
#include <string>

#include "common/errors.h"

namespace lora_serve {
namespace {

std::string MessageOf(const std::function<void()>& action) {
  try {
    action();
  } catch (const InternalError& error) {
    return error.what();
  }
  return "";
}

TEST(CheckTest, PassesSilentlyAndEvaluatesOnce) {
  int num_evaluations = 0;
  LS_CHECK(++num_evaluations == 1, "not printed");
  EXPECT_EQ(num_evaluations, 1);
}

TEST(CheckTest, ThrowsInternalErrorWithPlaceConditionAndValues) {
  const std::string message = MessageOf([] { LS_CHECK(1 + 1 == 3, "sum=", 2, " of ", "ones"); });
  EXPECT_NE(message.find("check_test.cc:"), std::string::npos) << message;
  EXPECT_NE(message.find("1 + 1 == 3 (sum=2 of ones)"), std::string::npos) << message;
}

TEST(CheckTest, NeedsNoValues) {
  const std::string message = MessageOf([] { LS_CHECK(false); });
  EXPECT_TRUE(message.ends_with("check failed: false")) << message;
}

TEST(CheckTest, IsOneStatement) {
  bool reached_else = false;
  if (false)
    LS_CHECK(true);
  else
    reached_else = true;
  EXPECT_TRUE(reached_else);
}

TEST(CheckTest, DebugCheckEvaluatesItsConditionOnlyInDebugBuilds) {
  int num_evaluations = 0;
  LS_DCHECK(++num_evaluations == 1);
#ifdef LS_DEBUG_CHECKS
  EXPECT_EQ(num_evaluations, 1);
  EXPECT_THROW(LS_DCHECK(false, "value ", 1), InternalError);
#else
  EXPECT_EQ(num_evaluations, 0);
  LS_DCHECK(false, "value ", 1);
#endif
}

TEST(CheckDeathTest, FatalPrintsItsValuesAndAborts) {
  const auto destroy = []() noexcept { LS_FATAL(2 < 1, "pins=", -1); };
  EXPECT_DEATH(destroy(), "check failed: 2 < 1 \\(pins=-1\\)");
}

}  // namespace
}  // namespace lora_serve
