#include "gradient.cuh"

namespace vcrd::cuda {

template const char* launch_gradient<__half>(const GradientParams&, cudaStream_t);

}  // namespace vcrd::cuda
