"""Nearest neighbours: exact search in bounded memory, on one process or many; FAISS and ScaNN behind the same call.

```python
from amradio.search import build_index, plan_memory, recall_at_k, top_k

scores, indices = top_k(queries, database, k=20)  # exact, and the same for any chunk size, device, number of processes
print(plan_memory(50_000, 1_281_167, 1280, k=20).describe())

index = build_index(database, "faiss:IVF1024,Flat", nprobe=32)
print(recall_at_k(index.search(queries, 20), top_k(queries, database, 20)))
```
"""

from amradio.search.exact import top_k
from amradio.search.index import ExactOptions, Index, build_index, load_index
from amradio.search.neighbours import Neighbours, recall_at_k
from amradio.search.plan import DEFAULT_MEMORY_LIMIT, MemoryPlan, plan_memory
from amradio.search.rows import Database, Sliceable

__all__ = [
    "DEFAULT_MEMORY_LIMIT",
    "Database",
    "ExactOptions",
    "Index",
    "MemoryPlan",
    "Neighbours",
    "Sliceable",
    "build_index",
    "load_index",
    "plan_memory",
    "recall_at_k",
    "top_k",
]
