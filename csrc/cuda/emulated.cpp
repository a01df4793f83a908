// The kernels compiled for the host (emulation.h).
#include "kernels.cu"
