"""What the plugin adds to `import torch`, measured in fresh processes.

    python benchmarks/startup.py

Each process imports torch with our autoload switched off, then does what autoload does, under a clock. Timing
`import torch` as a whole with and without the plugin shows nothing: it takes seconds and varies by tenths of one.
"""
import argparse
import os
import statistics
import subprocess
import sys

CODE = '''
import sys, time, torch
assert not [name for name in sys.modules if name.startswith('timm')]
start = time.perf_counter()
import timm_rope.plugin
timm_rope.plugin.autoload()
print(1000 * (time.perf_counter() - start))
assert 'timm' not in sys.modules and 'timm_rope.encodings' not in sys.modules
'''


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=10, help='fresh processes (default: 10)')
    args = parser.parse_args()
    env = {**os.environ, 'TORCH_DEVICE_BACKEND_AUTOLOAD': '0'}
    times = [
        float(subprocess.run([sys.executable, '-c', CODE], env=env, check=True, capture_output=True, text=True).stdout)
        for _ in range(args.rounds)]
    print(f'python {sys.version.split()[0]}, {os.cpu_count()} cores, {args.rounds} processes')
    print(f'added to import torch: median {statistics.median(times):.2f} ms, {min(times):.2f} to {max(times):.2f} ms')


if __name__ == '__main__':
    main()
