#include "statistics.cuh"

namespace vcrd::cuda {

template const char* launch_row_statistics<__nv_bfloat16>(const StatisticsParams&, int64_t, cudaStream_t);

}  // namespace vcrd::cuda
