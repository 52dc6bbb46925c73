"""Methods of condense_kernels.methods by the interfaces of libraries that prune visual tokens: one module a host.

No host is imported: each adapter is a function, or makes one, that the host is handed. docs/adapters.md says in which
file of the host it goes, and what it takes beside the loop there.
"""

from . import angelslim as angelslim
from . import keep_list as keep_list
from . import lightcompress as lightcompress
from . import llava as llava
from . import tome as tome
from . import uniprunebench as uniprunebench
from . import visionzip as visionzip
from . import vllm_evs as vllm_evs
