#!/usr/bin/env bash
# Surprise: safetensors.torch saves the conjugate of a tensor without the conjugation.
# Guess: what is loaded equals what was saved, as with torch.save.
# What happens: conj() is lazy in torch: the tensor shares its memory and carries a flag. The file
# gets the memory. The tensor counts as contiguous, so the check that refuses other views passes.
# Also .mH and spectra that were conjugated. Remedy: resolve_conj() before saving.
#
# Versions: torch 2.13.0, numpy 2.4.6, safetensors 0.8.0; Python 3.11, Linux x86-64, CPU.
# Seen:
#   z.conj()                 contiguous True, [1.-2.j 3.+4.j] -> [1.+2.j 3.-4.j]
#   z.conj().resolve_conj()  contiguous True, [1.-2.j 3.+4.j] -> [1.-2.j 3.+4.j]
#   spectrum.conj()          contiguous True, [ 6.-0.j -2.-2.j -2.-0.j -2.+2.j] -> [ 6.+0.j -2.+2.j -2.+0.j -2.-2.j]
#   w.mH of one row          contiguous True, [1.-2.j 3.+4.j] -> [1.+2.j 3.-4.j]
#   torch.save keeps it
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install -q torch==2.13.0 numpy==2.4.6 safetensors==0.8.0

cat > see.py <<'PY'
import io

import torch
from safetensors import torch as st

z = torch.tensor([1 + 2j, 3 - 4j])
spectrum = torch.fft.fft(torch.arange(4.0))
tensors = {
    "z.conj()": z.conj(),
    "z.conj().resolve_conj()": z.conj().resolve_conj(),
    "spectrum.conj()": spectrum.conj(),
    "w.mH of one row": torch.tensor([[1 + 2j, 3 - 4j]]).mH.reshape(2),
}
changed = []
for name, tensor in tensors.items():
    st.save_file({"x": tensor}, "a.safetensors")
    back = st.load_file("a.safetensors")["x"]
    if not torch.equal(back, tensor):
        changed.append(name)
    print(
        f"{name:24s} contiguous {tensor.is_contiguous()}, {tensor.resolve_conj().numpy()} -> {back.numpy()}"
    )
assert changed == ["z.conj()", "spectrum.conj()", "w.mH of one row"], changed
stream = io.BytesIO()
torch.save(z.conj(), stream)
stream.seek(0)
assert torch.equal(torch.load(stream), z.conj())
print("torch.save keeps it")
PY
env/bin/python see.py
