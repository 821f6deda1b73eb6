#include "gradient.cuh"

namespace vcrd::cuda {

template const char* launch_gradient<__nv_bfloat16>(const GradientParams&, cudaStream_t);

}  // namespace vcrd::cuda
