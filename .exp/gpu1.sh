set -x
export PYTHONPATH=. JAX_COMPILATION_CACHE_DIR=/tmp/jaxcache
nvidia-smi --query-gpu=name --format=csv
( JAX_PLATFORMS=cpu OMP_NUM_THREADS=1 timeout 560 python -m pytest -q -n 11 --dist worksteal --durations=15 -p no:cacheprovider tests/test_adapter_kinds.py tests/test_against_peft.py -m "not gpu" > $OUT/cpu.txt 2>&1 ) &
JLORA_TEST_PLATFORM=cuda XLA_PYTHON_CLIENT_PREALLOCATE=false timeout 560 python -m pytest -q -s -p no:cacheprovider -m gpu tests/test_gpu_engine.py > $OUT/gpu_engine.txt 2>&1 &
( JLORA_TEST_PLATFORM=cuda XLA_PYTHON_CLIENT_PREALLOCATE=false timeout 560 python -m pytest -q -p no:cacheprovider -m gpu -n 2 tests/kernels > $OUT/gpu_kernels.txt 2>&1 ) &
wait
for f in cpu gpu_engine gpu_kernels; do echo "== $f"; grep -v "Loading\|Writing" $OUT/$f.txt | tail -40; done
