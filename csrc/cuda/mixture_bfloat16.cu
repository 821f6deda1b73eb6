#include "mixture.cuh"

namespace vcrd::cuda {

template const char* launch_mixture_sums<__nv_bfloat16>(const MixtureParams&, int64_t, cudaStream_t);

}  // namespace vcrd::cuda
