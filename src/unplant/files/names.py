"""Which names a checkpoint's pickle may hold, although none of them is ever imported.

A file of weights has no use for other names than these. Whoever loads a file that names more with another program runs
what it names, so such a file is refused: the user shall know, and can save its tensors with `unplant inspect`.
`functools.partial` is on no list on purpose: it holds a call to be made later, which weights never need.
"""

import re
from collections.abc import Iterable
from typing import Literal

from unplant.files.nodes import Name

Kind = Literal["tensor", "harmless", "runs code", "unknown"]

_TENSOR = re.compile(
    r"""
    torch\._utils\._rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state|sparse_tensor|sparse_csr_tensor
        |qtensor|meta_tensor_no_storage|nested_tensor|device_tensor_from_numpy|device_tensor_from_cpu_tensor)
    | torch\._tensor\._rebuild_from_type_v2
    | torch\.(nn\.parameter\.(Parameter|Buffer)|Tensor|Size|device|[A-Z]\w{0,20}Storage)
    | torch\.storage\.\w{1,9}Storage
    | torch\.(float|bfloat|complex|uint|int|quint|qint|bits)\d\w{0,12} | torch\.bool
    | torch\.(strided|sparse_coo|sparse_csr|sparse_csc|per_tensor_affine|per_tensor_symmetric|per_channel_affine
        |per_channel_symmetric|per_channel_affine_float_qparams)
    | torch\.serialization\._get_layout
    | collections\.OrderedDict
    """,
    re.VERBOSE,
)
"""Tensors and what state_dicts are made of."""

_HARMLESS = re.compile(
    r"""
    numpy\.(_core|core)\.(multiarray\.(scalar|_reconstruct)|numeric\._frombuffer)
    | numpy\.(dtype|ndarray|bool_?|(u?int|float|complex)\d{1,3}|dtypes\.\w{1,30}DType)
    | numpy\.random\._(pickle|mt19937|pcg64)\.(__\w{1,30}_ctor|MT19937|PCG64)
    | argparse\.Namespace | types\.SimpleNamespace
    | pathlib\.(_local\.)?(Pure)?(Posix|Windows)?Path
    | collections\.(Counter|defaultdict|deque)
    | datetime\.(datetime|date|time|timedelta|timezone) | decimal\.Decimal | fractions\.Fraction | uuid\.(UUID|SafeUUID)
    | (builtins|__builtin__)\.(set|frozenset|list|dict|tuple|str|unicode|int|long|float|bool|bytes|bytearray|complex
        |slice|range|xrange|object)
    | _codecs\.encode | copyreg\._reconstructor | copy_reg\._reconstructor
    | torch\.optim\.(sgd\.SGD|adam\.Adam|adamw\.AdamW|adamax\.Adamax|rmsprop\.RMSprop|adagrad\.Adagrad|nadam\.NAdam
        |radam\.RAdam|adadelta\.Adadelta|asgd\.ASGD|lbfgs\.LBFGS)
    | torch\.optim\.lr_scheduler\.(StepLR|MultiStepLR|ConstantLR|LinearLR|ExponentialLR|PolynomialLR|CosineAnnealingLR
        |CosineAnnealingWarmRestarts|CyclicLR|OneCycleLR|LambdaLR|MultiplicativeLR|SequentialLR|ChainedScheduler
        |ReduceLROnPlateau)
    """,
    re.VERBOSE,
)
"""Plain values that training scripts keep beside their weights, and the optimizer's and the scheduler's class."""

_RUNNING = {
    *("os", "posix", "nt", "subprocess", "sys", "runpy", "importlib", "imp", "ctypes", "_ctypes", "socket", "_socket"),
    *("shutil", "webbrowser", "pty", "pickle", "_pickle", "cPickle", "marshal", "code", "codeop", "pdb", "bdb"),
    *("commands", "platform", "pip", "ensurepip", "venv", "timeit", "trace", "profile", "cProfile", "pydoc", "doctest"),
    *("asyncio", "multiprocessing", "concurrent", "threading", "signal", "ssl", "http", "httplib", "urllib", "urllib2"),
    *("ftplib", "smtplib", "telnetlib", "imaplib", "poplib", "requests", "aiohttp", "operator", "_operator"),
    *("functools", "tempfile", "zipimport", "pkgutil", "linecache", "inspect", "gc", "io", "_io", "logging"),
    *("idlelib", "lib2to3", "distutils", "setuptools", "test", "_pyrepl", "_osx_support", "_aix_support"),
    *("cloudpickle", "dill", "joblib", "sqlite3", "turtle", "builtins", "__builtin__", "types", "uuid"),
}
"""Top modules of which any name that isn't harmless runs code, opens files or the network, or finds what does."""

_RUNNING_BELOW = (
    *("numpy.testing", "numpy.f2py", "numpy.load", "numpy.ctypeslib", "torch.hub", "torch.jit", "torch.serialization"),
    *("torch.load", "torch.ops", "torch.classes", "torch.fx", "torch._dynamo", "torch._inductor", "torch.package"),
    *("torch.utils.bottleneck", "torch.utils.collect_env", "torch.utils.cpp_extension", "torch.utils.model_zoo"),
    *("torch.utils._config_module", "torch.utils.data.datapipes", "torch.distributed.rpc", "torch.multiprocessing"),
    *("torch.storage._load_from_bytes", "pandas.eval", "pandas.io", "pandas.read_pickle"),
)


def kind(name: Name) -> Kind:
    """What a name would do if it were imported and called.

    >>> kind(Name("torch", "FloatStorage")), kind(Name("argparse", "Namespace"))
    ('tensor', 'harmless')
    >>> kind(Name("posix", "system")), kind(Name("wideresnet", "WideResNet"))
    ('runs code', 'unknown')
    """
    text = str(name)
    if _TENSOR.fullmatch(text):
        return "tensor"
    if _HARMLESS.fullmatch(text):
        return "harmless"
    below = any(text == start or text.startswith(f"{start}.") for start in _RUNNING_BELOW)
    return "runs code" if below or text.partition(".")[0] in _RUNNING else "unknown"


def by_kind(names: Iterable[Name]) -> dict[Kind, list[str]]:
    """The names of each kind, as text in alphabetical order."""
    found: dict[Kind, list[str]] = {"tensor": [], "harmless": [], "runs code": [], "unknown": []}
    for name in names:
        found[kind(name)].append(str(name))
    return {each: sorted(texts) for each, texts in found.items()}
