"""GPUs by name: what their makers' data sheets say, and what renting one usually costs."""

from pipeline.recipe import Gpu


def _gpu(memory_gb: float, bf16_tflops: float, bandwidth_gbs: float, usd_per_hour: float) -> Gpu:
    return Gpu(
        memory_gb=memory_gb,
        bf16_tflops=bf16_tflops,
        bandwidth_gbs=bandwidth_gbs,
        usd_per_hour=usd_per_hour,
    )


# Rates are dense: data sheets often quote twice as much, with sparsity. Those of GeForce cards are
# with float32 accumulation. Prices are typical of hourly rents in the public clouds; yours go into
# the recipe, as plan.gpus.
GPUS = {
    "RTX 4090": _gpu(24, 165, 1008, 0.45),
    "RTX 5090": _gpu(32, 209, 1792, 0.75),
    "RTX PRO 6000": _gpu(96, 503, 1792, 1.80),
    "L4": _gpu(24, 121, 300, 0.70),
    "A10G": _gpu(24, 70, 600, 1.00),
    "L40S": _gpu(48, 362, 864, 1.20),
    "A100-40GB": _gpu(40, 312, 1555, 1.30),
    "A100-80GB": _gpu(80, 312, 2039, 1.80),
    "H100": _gpu(80, 989, 3350, 2.80),
    "H200": _gpu(141, 989, 4800, 3.60),
    "B200": _gpu(180, 2250, 7700, 5.50),
}
