// SPDX-License-Identifier: BSD-3-Clause
// Whole units: how many hold a value, and the value that they hold.
#pragma once

#include "common/host_device.h"

#include <cstdint>

namespace dynconv {

DYNCONV_HOST_DEVICE int64_t ceil_div(int64_t value, int64_t unit) { return (value + unit - 1) / unit; }
DYNCONV_HOST_DEVICE int64_t round_up(int64_t value, int64_t unit) { return ceil_div(value, unit) * unit; }

}  // namespace dynconv
