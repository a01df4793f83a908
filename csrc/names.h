// The names by which Python knows scalars, rules and penalties; their places are the kernels' rows.

#pragma once

#include <string>

#include <torch/headeronly/util/Exception.h>

#include "penalties.h"
#include "update_rules.h"

namespace tl1 {
namespace {

#define TL1_NAME(name, ...) name,
constexpr const char* RULE_NAMES[] = {TL1_RULES(TL1_NAME)};
constexpr const char* PENALTY_NAMES[] = {TL1_PENALTIES(TL1_NAME)};
constexpr const char* COUPLED_NAMES[] = {TL1_COUPLED(TL1_NAME)};
#define TL1_SCALAR_NAME(name) #name,
constexpr const char* SCALAR_NAMES[] = {TL1_SCALARS(TL1_SCALAR_NAME)};

// The place of a name, or -1.
template <size_t N>
int index_of(const std::string& name, const char* const (&names)[N]) {
  for (size_t i = 0; i < N; i++) {
    if (name == names[i]) return static_cast<int>(i);
  }
  return -1;
}

template <size_t N>
std::string joined(const char* const (&names)[N], const char* separator = " ") {
  std::string all;
  for (size_t i = 0; i < N; i++) all += std::string(i ? separator : "") + names[i];
  return all;
}

template <size_t N>
int row_of(const char* argument, const std::string& name, const char* const (&names)[N]) {
  const int row = index_of(name, names);
  STD_TORCH_CHECK(row >= 0, argument, " must be one of '", joined(names, "', '"), "', got '", name,
                  "'");
  return row;
}

}  // namespace
}  // namespace tl1
