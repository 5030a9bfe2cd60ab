"""Memory and time of `python -m timm_rope convert` on a file of the size of ViT-L.

    python benchmarks/conversion.py [--json FILE]

A random file with the keys of NAVER's vit_large RoPE-Mixed is converted by fresh processes, as safetensors and
as a file of torch.save. Their peak RSS counts the pages of the file they map, which the system could take back. This
process stays small, and others make the files: Linux counts the memory of a parent for its children.
"""
import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict

MAKE = '''
import json, sys, torch
from safetensors.torch import load_file

folder, width, depth = sys.argv[1], 1024, 24
shapes = {'cls_token': (1, 1, width), 'freqs': (2, depth, width // 2), 'freqs_t_x': (196,), 'freqs_t_y': (196,),
          'patch_embed.proj.weight': (width, 3, 16, 16), 'patch_embed.proj.bias': (width,)}
for i in range(depth):
    for key, shape in {
            'norm1.weight': (width,), 'norm1.bias': (width,), 'norm2.weight': (width,), 'norm2.bias': (width,),
            'attn.qkv.weight': (3 * width, width), 'attn.qkv.bias': (3 * width,), 'attn.proj.weight': (width, width),
            'attn.proj.bias': (width,), 'mlp.fc1.weight': (4 * width, width), 'mlp.fc1.bias': (4 * width,),
            'mlp.fc2.weight': (width, 4 * width), 'mlp.fc2.bias': (width,), 'gamma_1': (width,), 'gamma_2': (width,),
    }.items():
        shapes[f'blocks.{i}.{key}'] = shape
shapes.update({'norm.weight': (width,), 'norm.bias': (width,), 'head.weight': (1000, width), 'head.bias': (1000,)})

header, end = {}, 0
for key, shape in shapes.items():
    start, end = end, end + 4 * torch.Size(shape).numel()
    header[key] = dict(dtype='F32', shape=shape, data_offsets=[start, end])
text = json.dumps(header).encode()
tables = {'freqs_t_x': torch.arange(196.) % 14, 'freqs_t_y': torch.arange(196.) // 14}
with open(f'{folder}/large.safetensors', 'wb') as file:  # one tensor at a time
    file.write(len(text).to_bytes(8, 'little') + text)
    for key, shape in shapes.items():
        file.write(tables.get(key, torch.randn(shape) * .02).numpy().tobytes())
torch.save({'model': load_file(f'{folder}/large.safetensors')}, f'{folder}/large.bin')
'''


def measure(source: Path, out: Path) -> Dict[str, Any]:
    """Convert in a fresh process; seconds, peak RSS and its ratio to the size of the file."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, '-m', 'timm_rope', 'convert', str(source), str(out)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f'convert of {source.name} failed with status {process.returncode}.')
    peak = usage.ru_maxrss * (1 if sys.platform == 'darwin' else 1024)
    size = source.stat().st_size
    return dict(
        source=source.name, file_bytes=size, peak_rss_bytes=peak, ratio=peak / size,
        seconds=time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the figures to FILE, too')
    parser.add_argument('--folder', metavar='DIR', help='where to put 4 GB of temporary files (default: of the system)')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        subprocess.run([sys.executable, '-c', MAKE, name], check=True)
        results = []
        for source in (folder / 'large.bin', folder / 'large.safetensors'):
            results.append(measure(source, folder / 'out'))
            for file in (folder / 'out').iterdir():
                file.unlink()
    print(f'python {platform.python_version()}, {os.cpu_count()} cores')
    for each in results:
        megabytes = each['file_bytes'] / 1e6, each['peak_rss_bytes'] / 1e6
        print(f'{each["source"]:<18} {megabytes[0]:,.0f} MB, peak RSS {megabytes[1]:,.0f} MB = {each["ratio"]:.2f} x '
              f'the file, {each["seconds"]:.1f} s')
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + '\n')


if __name__ == '__main__':
    main()
