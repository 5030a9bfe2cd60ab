"""Time and memory of create_model(pretrained=True), beside timm's own rotary ViT with the same weights.

    python benchmarks/loading.py --rounds 10 --json loading.json

vit_base_rope_axial and timm's vit_base_patch16_rope_224 load one random safetensors file in timm's layout from a Hub on
the loopback interface. Each measurement is a fresh process; the two models take turns in every round, so that what
else the machine does meets both. The clock and the peak of resident memory cover create_model alone, what it imports
included. The cache is warm unless --cold. Ours also hashes the file, in a thread; timm does not.
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, List

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / 'tests'))

from hub_server import HubServer  # noqa: E402

REPO = 'bench/vit'
MODELS = {'ours': 'vit_base_rope_axial', 'timm': 'vit_base_patch16_rope_224'}
WRITE = f'''
import sys, timm, torch
from safetensors.torch import save_file
torch.manual_seed(0)
save_file(timm.create_model({MODELS['timm']!r}).state_dict(), sys.argv[1])
'''
MEASURE = f'''
import json, sys, time
import timm

def resident(kind):
    with open('/proc/self/status') as file:
        return next(int(line.split()[1]) for line in file if line.startswith(kind)) / 1024

with open('/proc/self/clear_refs', 'w') as file:
    file.write('5')  # the peak starts from here
before = resident('VmRSS')
start, busy = time.perf_counter(), time.process_time()
model = timm.create_model(sys.argv[1], pretrained=True, pretrained_cfg_overlay=dict(hf_hub_id={REPO!r}))
seconds, busy = time.perf_counter() - start, time.process_time() - busy
peak = resident('VmHWM') - before
weights = float(model.blocks[-1].mlp.fc2.weight.double().sum())
print(json.dumps(dict(
    seconds=seconds, cpu_seconds=busy, peak_mib=peak, after_mib=resident('VmRSS') - before, weights=weights)))
'''
VERSIONS = '''
import json, huggingface_hub, safetensors, timm, timm_rope, torch
print(json.dumps({m.__name__: m.__version__ for m in (torch, timm, timm_rope, huggingface_hub, safetensors)}))
'''


def python(script: str, *args: Any, **env: Any) -> str:
    """Standard output of a fresh process."""
    env = {**os.environ, 'HF_HUB_DISABLE_PROGRESS_BARS': '1', **{k: str(v) for k, v in env.items()}}
    done = subprocess.run([sys.executable, '-c', script, *map(str, args)], env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def machine() -> Dict[str, Any]:
    cpu = [line.split(': ')[1] for line in Path('/proc/cpuinfo').read_text().splitlines() if 'model name' in line]
    git = ['git', '-C', str(ROOT)]
    commit = subprocess.run([*git, 'rev-parse', 'HEAD'], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, 'status', '--porcelain'], capture_output=True, text=True).stdout.strip()
    return dict(
        cpu=cpu[0] if cpu else platform.processor(), cores=os.cpu_count(), load=os.getloadavg()[0],
        threads=os.environ.get('OMP_NUM_THREADS'), python=platform.python_version(),
        commit=commit + (' with changes' if changed else ''), **json.loads(python(VERSIONS)))


def measure(rounds: int, cold: bool) -> Dict[str, List[Dict[str, float]]]:
    """Model -> one measurement per round."""
    results: Dict[str, List[Dict[str, float]]] = {which: [] for which in MODELS}
    with tempfile.TemporaryDirectory() as folder, HubServer() as hub:
        file = Path(folder, 'model.safetensors')
        python(WRITE, file)
        hub.add(REPO, {file.name: file.read_bytes()})
        file.unlink()
        for i in range(-1, rounds):  # the first round fills caches and is not counted
            for which in (MODELS, reversed(MODELS))[i % 2]:
                cache = Path(folder, f'cache-{which}-{i}' if cold else 'cache')
                env = dict(HF_ENDPOINT=hub.url, HF_HUB_CACHE=cache, HF_HUB_DISABLE_XET=1)
                results[which].append(json.loads(python(MEASURE, MODELS[which], **env)))
    weights = {result['weights'] for results_of in results.values() for result in results_of}
    assert len(weights) == 1, 'both load the same weights'
    return {which: results_of[1:] for which, results_of in results.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=10, help='pairs of processes (default: 10)')
    parser.add_argument('--cold', action='store_true', help='download in every process')
    parser.add_argument('--json', metavar='FILE', help='write everything to a file')
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f'--rounds must be at least 1, got {args.rounds}')
    about = machine()
    results = measure(args.rounds, args.cold)
    summary: Dict[str, Any] = {}
    for key in ('seconds', 'cpu_seconds', 'peak_mib', 'after_mib'):
        ours, timm = ([result[key] for result in results[which]] for which in ('ours', 'timm'))
        summary[key] = dict(
            ours=statistics.median(ours), timm=statistics.median(timm),
            ratio=statistics.median(a / b for a, b in zip(ours, timm)))
    print(', '.join(f'{key} {value}' for key, value in about.items()))
    cache = 'cold' if args.cold else 'warm'
    print(f'{args.rounds} rounds, {cache} cache; medians, and the median of the paired ratios')
    for key, row in summary.items():
        print(f'{key:11} ours {row["ours"]:8.2f}   timm {row["timm"]:8.2f}   ratio {row["ratio"]:.2f}')
    if args.json:
        content = dict(machine=about, cold=args.cold, models=MODELS, summary=summary, rounds=results)
        Path(args.json).write_text(json.dumps(content, indent=1) + '\n')


if __name__ == '__main__':
    main()
