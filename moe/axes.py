"""The one alphabet of axes. Annotations use these letters, einsums the same in lower case.

| letter | axis |
|---|---|
| `B` | sequences of a batch |
| `S` | positions of a sequence |
| `T` | tokens (`B` x `S`, flattened) |
| `D` | model width |
| `F` | hidden width of an expert or of a dense MLP |
| `E` | experts |
| `K` | choices a token |
| `C` | slots an expert (capacity) |
| `G` | groups of experts |
| `L` | sparse layers |
| `H` | heads |
| `V` | vocabulary |
| `M` | segments, sampled paths, or text domains |
| `N` | rows handed to experts (one row for each kept choice) |

Mesh axes, outermost first: the last ones talk most and get the neighbouring devices
(`moe.parallel.mesh`). The batch is sharded over `BATCH_AXES`, its positions over `sequence`; which
parameters lie where is one of the presets of `moe.parallel.rules`.
"""

DATA = "data"
FSDP = "fsdp"
EXPERT = "expert"
SEQUENCE = "sequence"
TENSOR = "tensor"

MESH_AXES = (DATA, FSDP, EXPERT, SEQUENCE, TENSOR)
BATCH_AXES = (DATA, FSDP, EXPERT)
