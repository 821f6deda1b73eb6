#include "gradient.cuh"

namespace vcrd::cuda {

template const char* launch_gradient<float>(const GradientParams&, cudaStream_t);

}  // namespace vcrd::cuda
