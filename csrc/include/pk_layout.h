// The structs of pk_abi.h as text, for the loader to compare: the number of the ABI, then a line
// for each struct with its size and for each field with its type and offset.
#pragma once

#include <stddef.h>

#include <string>

#include "pk_abi.h"

namespace pk {

static inline const char* type_name(double) {
  return "float64";
}
static inline const char* type_name(int32_t) {
  return "int32";
}
static inline const char* type_name(int64_t) {
  return "int64";
}
static inline const char* type_name(const void*) {
  return "pointer";
}

static inline std::string layout() {
  std::string text = "ABI " + std::to_string(kAbi) + "\n";
#define PK_FIELD(type, name)                                                \
  text += struct_name + "." #name " " + type_name(Struct{}.name) + " at " + \
          std::to_string(offsetof(Struct, name)) + "\n";
#define PK_STRUCT(Name, FIELDS)                                              \
  {                                                                          \
    using Struct = Name;                                                     \
    const std::string struct_name = #Name;                                   \
    text += struct_name + " " + std::to_string(sizeof(Struct)) + " bytes\n"; \
    FIELDS(PK_FIELD)                                                         \
  }
  PK_STRUCTS(PK_STRUCT)
#undef PK_STRUCT
#undef PK_FIELD
  return text;
}

}  // namespace pk
