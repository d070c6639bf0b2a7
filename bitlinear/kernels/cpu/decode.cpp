#include "decode.h"

#include "attention.h"
#include "head.h"
