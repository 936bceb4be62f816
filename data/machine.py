"""The machine: devices, what compiling needs, memory, signals; and the ranks, the processes that torchrun starts."""

import datetime
import errno
import importlib.util
import itertools
import json
import os
import re
import signal
import sys
import tempfile
import threading
import time
import warnings
from contextlib import contextmanager, suppress
from functools import lru_cache

import torch
import torch.distributed as dist

import tinylm
from data.cli import STOP_SIGNALS, InputError, RankError, has_ranks, one_line, speaks

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # to compute in
DTYPES_OF_FILES = DTYPES | {"float16": torch.float16}
# What data sheets promise in bfloat16 without sparsity: FLOP/s by a part of the device's name, the first that fits.
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12, "A10G": 70e12,
              "L40S": 362e12, "L40": 181e12, "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12}

@contextmanager
def modes_of_its_own():
    """Within it gradients are on, inference mode and autocast off, whatever the caller has switched."""
    with (torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False),
          torch.autocast("cuda", enabled=False)):
        yield

# ---- Devices ----

def choose_device(device):
    """The device asked for, or the best there is: "cuda", "cuda:1", "cpu".

    Raises InputError where it isn't there, and where a GPU is there that torch can't use, so that nobody trains on a
    CPU unawares.
    """
    if device and not re.fullmatch("cpu|cuda(:[0-9]+)?", device):
        raise InputError(f"--device={device}: expected cpu, cuda or cuda:NUMBER")
    if device == "cpu":
        return device
    count, problem = count_devices()
    if problem:
        raise InputError(f"the GPU can't be used: {problem}; see to that, or give --device=cpu")
    number = int((device or "").partition(":")[2] or 0)
    if device and number >= count:
        raise InputError(f"--device={device}: this machine has {count} CUDA device(s); give "
                         f"--device={'cuda' if count else 'cpu'}")
    if count:
        check_architecture(number)
    return device or ("cuda" if count else "cpu")

@lru_cache(maxsize=1)  # as torch warns once
def count_devices():
    """How many CUDA devices there are, and what is wrong with the driver where torch warns of that."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return count, one_line(told[0].message) if told and not count else None

def check_architecture(number):
    """Raise InputError where this build of torch has no code for a GPU: its own, of an older minor, or PTX to compile.
    """
    capability = torch.cuda.get_device_capability(number)
    if torch.version.hip:
        return  # whose architectures have other names
    for name in torch.cuda.get_arch_list():
        kind, digits = re.fullmatch(r"(sm|compute)_(\d+)\D?", name).groups()
        major, minor = int(digits[:-1]), int(digits[-1])
        if (major, minor) <= capability and (kind == "compute" or major == capability[0]):
            return
    raise InputError(f"{torch.cuda.get_device_name(number)} has compute capability {capability[0]}.{capability[1]}, "
                     f"for which torch {torch.__version__} has no code ({', '.join(torch.cuda.get_arch_list())}); "
                     "install another torch, or give --device=cpu")

@contextmanager
def numerics(device):
    """Within it a CPU computes the same numbers from run to run, and CUDA float32 products in TF32."""
    deterministic = torch.get_deterministic_debug_mode()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    places = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    precisions, precision = [place.fp32_precision for place in places], "highest"
    with suppress(RuntimeError):  # where the caller has set them by these names
        precision = torch.get_float32_matmul_precision()
    # Compiled code would otherwise add up the gradients of the embedding in whatever order its threads come.
    # torch.use_deterministic_algorithms would set this too, and import the compiler for it, which takes a second.
    torch.set_deterministic_debug_mode("error" if device == "cpu" else "default")
    torch.utils.deterministic.fill_uninitialized_memory = False  # no result here depends on it
    torch.set_float32_matmul_precision("highest" if device == "cpu" else "high")
    try:
        with torch.random.fork_rng(devices=[]):  # as each step seeds what it draws
            yield
    finally:
        torch.set_deterministic_debug_mode(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = fills
        torch.set_float32_matmul_precision(precision)
        for place, before in zip(places, precisions):
            place.fp32_precision = before

TO_GO_ON = "(to go on with a run in bfloat16, give that and --init_from=RUN/latest in place of --resume)"

def has_bfloat16(device):
    """Whether a device has instructions for bfloat16: CPUs with AVX-512's, and GPUs from Ampere on."""
    if device == "cpu":
        return tinylm.HAS_ONEDNN and torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.cuda.get_device_capability(device) >= (8, 0)

def check_dtype(dtype, device):
    """Raise InputError where a device can't compute in a dtype, given by its name. (CPUs can, if slowly.)"""
    if dtype == "int8" and device != "cpu":
        raise InputError("--dtype=int8 is for CPUs; leave it out, or add --device=cpu")
    if dtype == "bfloat16" and device != "cpu" and not has_bfloat16(device):
        major, minor = torch.cuda.get_device_capability(device)
        raise InputError(f"--dtype=bfloat16: {torch.cuda.get_device_name(device)} has compute capability "
                         f"{major}.{minor}, and bfloat16 needs 8.0; give --dtype=float32 {TO_GO_ON}")

def dtype_to_write_in(name, device):
    """The dtype that --dtype of sample.py names; None, for that of the weights, where it is not given."""
    check_dtype(name, device)
    return DTYPES.get(name) or (None if device == "cpu" or has_bfloat16(device) else torch.float32)

def check_compiler(device, dtype, compiles=False):
    """Raise InputError where something is to be compiled, and a compiler, Python's headers or a newer GPU are missing.

    torch.compile needs them, and Triton for the kernels of attention that bfloat16 has on CUDA.
    """
    has_kernels = device != "cpu" and dtype == torch.bfloat16 and importlib.util.find_spec("triton") is not None
    if not compiles and not has_kernels:
        return
    purpose = "--compile" if compiles else "bfloat16 on CUDA"
    instead = " ".join(["--compile=False"] * compiles + [f"--dtype=float32 {TO_GO_ON}"] * has_kernels)
    on_cpu = [os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")]
    missing = tinylm.missing_to_build(on_cpu if device == "cpu" else tinylm.c_compilers())
    if missing:
        raise InputError(f"{purpose} needs {missing}, which is not there; install a C++ compiler and Python's headers "
                         f"(g++ and python3-dev on Debian), or give {instead}")
    if compiles and device != "cpu" and importlib.util.find_spec("triton") is None:
        raise InputError("--compile on CUDA needs the package triton, which is not there; install it (triton-windows "
                         "on Windows), or give --compile=False")
    if compiles and device != "cpu" and torch.cuda.get_device_capability(device) < (7, 0):
        raise InputError("--compile: torch.compile needs compute capability 7.0, which "
                         f"{torch.cuda.get_device_name(device)} has not; give --compile=False")

@contextmanager
def within_memory(advice):
    """Within it a device that has too little memory is one line, with advice; and a disk with no room to compile in."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # from CUDA; from a CPU, in PyTorch and in NumPy
        if os.strerror(errno.ENOSPC) in str(error):
            variable = "TORCHINDUCTOR_CACHE_DIR" if "TORCHINDUCTOR_CACHE_DIR" in os.environ else "TMPDIR"
            raise InputError(f"no space is left in {os.environ.get(variable, tempfile.gettempdir())}, where code is "
                             f"compiled; make room, let {variable} name another folder, or give --compile=False"
                             ) from None
        texts = "can't allocate memory", "out of memory", "ALLOC_FAILED"
        if not isinstance(error, MemoryError) and not any(text in str(error) for text in texts):
            raise
        # The rest is about PyTorch's allocator, or how to find a mistake in a kernel.
        what = re.split(" GPU | CUDA kernel", one_line(error))[0].rstrip(".") or "out of memory"
        raise RankError(f"{what}; {advice}") from None

def on_device(inputs, targets, device):
    """A batch on a device. To CUDA it goes in one copy, from memory that the device reads while the host goes on."""
    if device == "cpu":
        return inputs, targets
    return torch.stack((inputs, targets)).pin_memory().to(device, non_blocking=True).unbind()

def to_host(tensor):
    """A function → the numbers of a tensor as a list. They travel at once, and the host waits where it is called."""
    if tensor.is_cpu:
        return tensor.tolist
    copy = tensor.to("cpu", non_blocking=True)
    arrival = torch.cuda.current_stream(tensor.device).record_event()

    def wait():
        arrival.synchronize()
        return copy.tolist()

    return wait

def peak_memory(device):
    """{"peak_memory": the most this process had so far, in bytes: on the device, or on a CPU all of it}.

    Empty where a system does not say it, as Windows.
    """
    if device != "cpu":
        return {"peak_memory": torch.cuda.max_memory_allocated(device)}
    try:
        import resource
    except ImportError:
        return {}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}

def peak_flops(device):
    """What a device promises, in FLOP/s, or None where that is not known."""
    name = torch.cuda.get_device_name(device) if device != "cpu" else ""
    if re.search("MIG|NVL|Laptop|Max-Q", name):  # which have less than others of the name
        return None
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)

class Interrupt:
    """Within it the first of STOP_SIGNALS sets `asked`: a step ends and is saved. One that comes more than two seconds
    later ends all, but SIGXCPU, which a system repeats. (torchrun hands on to its ranks signals that they have got
    already, hence the two seconds. The death of torchrun asks as well.)
    """

    def __init__(self):
        self.number, self.since, self.old = 0, 0.0, {}
        self.parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    @property
    def asked(self):
        return bool(self.number) or self.parent not in (None, os.getppid())

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # others can't have signals
            self.old = {number: signal.signal(number, self.note) for number in STOP_SIGNALS
                        if number in STOP_SIGNALS[:2] or signal.getsignal(number) != signal.SIG_IGN}  # as nohup has it
        return self

    def __exit__(self, _=None, error=None, __=None):
        for number, handler in self.old.items():
            signal.signal(number, handler)
        if self.number and "torch._inductor" in type(error).__module__:  # a C++ compiler at work may have got it too
            raise (KeyboardInterrupt if self.number == signal.SIGINT else SystemExit(128 + self.number)) from error

    def note(self, number, _):
        if self.number and time.monotonic() > self.since + 2 and number != getattr(signal, "SIGXCPU", None):
            self.__exit__()
            os.kill(os.getpid(), number)
        elif not self.number:
            self.number, self.since = number, time.monotonic()
            if speaks():
                with suppress(OSError):  # of a terminal that is gone; print may be at work and is not for handlers
                    os.write(2, b"\nends after this step, and saves it; once more, after two seconds, ends at once\n")

AT_WORK = threading.Lock()

@contextmanager
def alone():
    """Within it no other run is at work in this process, whose threads have torch's settings in common."""
    if not AT_WORK.acquire(blocking=False):
        raise InputError("another run is at work in this process; start this one in a process of its own")
    try:
        yield
    finally:
        AT_WORK.release()

# ---- Ranks ----

@contextmanager
def ranks(device):
    """Within it this process is with the other ranks, where torchrun started it. → its device, its number, how many.

    Only the first rank has a stdout there.
    """
    stdout = sys.stdout
    try:
        yield join_ranks(device)
        if dist.is_initialized():
            if dist.get_backend() == "gloo":
                # While this waits, gloo's threads let go of the last tensors, as a rule; see `leaving_gloo`.
                with suppress(RuntimeError):  # of a rank that failed
                    dist.barrier()
            dist.destroy_process_group()
    except BaseException as error:  # of this rank alone, maybe, and NCCL would wait for the others here
        if dist.is_initialized() and dist.get_backend() == "gloo":
            dist.destroy_process_group()
        if isinstance(error, RuntimeError) and re.search("gloo.*(closed|reset) by peer", str(error), re.DOTALL):
            time.sleep(5)  # so that torchrun, which ends all when one has failed, finds that one
            raise RankError(f"rank {os.environ.get('RANK')}: another rank is gone; what that has said, or torchrun, "
                            "tells why") from None
        raise
    finally:
        sys.stdout = stdout

RUNS = itertools.count()  # in this process, and so in each rank of it

@contextmanager
def leaving_gloo():
    """After it a process that torchrun started ends at once, once it has written all. A thread of gloo may hold a last
    tensor of a split model still, and would abort where Python, taking its time to end, no longer lets it go.
    """
    code = 0
    try:
        yield
    except SystemExit as end:
        code = end.code
    if not has_ranks():
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # whose reader is gone
            stream.flush()
    os._exit(code or 0)

def join_ranks(device):
    """Join the other ranks, where there are some. → (device of this rank, its number, how many)."""
    if not has_ranks():
        return device, 0, 1
    kind = device.split(":")[0]
    if kind == "cuda":
        number, count = int(os.environ["LOCAL_RANK"]), count_devices()[0]
        if number >= count:  # which is 0 of 1 on every rank with torchrun --virtual-local-rank
            here = os.environ.get("LOCAL_WORLD_SIZE", number + 1)
            kind_of_error = RankError if number == count else InputError  # the first without a device says it
            raise kind_of_error(f"{here} ranks on this machine, and each needs a CUDA device, of which it has {count}; "
                                f"give torchrun --nproc_per_node={count}")
        device = choose_device(f"cuda:{number}")
        if not dist.is_nccl_available():
            raise InputError("ranks on CUDA need NCCL, which this torch has not; give --device=cpu, or start one "
                             "process without torchrun")
        torch.cuda.set_device(device)
    # The first rank may prepare data for hours before the others hear of it. One that dies is noticed by torchrun.
    timeout = datetime.timedelta(hours=12)
    try:
        try:
            store, rank, num_ranks = next(dist.rendezvous("env://", timeout=datetime.timedelta(minutes=10)))
        except ValueError as error:
            raise InputError(f"RANK, WORLD_SIZE or MASTER_PORT is no number ({error}); leave them to torchrun"
                             ) from None
        store.set_timeout(timeout)
        # torchrun keeps its store when it starts ranks again; they must not find the addresses of those that died.
        # Nor must a second run in the same processes.
        attempt = f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}, run {next(RUNS)}"
        store, backend = dist.PrefixStore(attempt, store), "nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks, timeout=timeout)
    except dist.DistError:
        raise InputError(f"no connection to {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}, where "
                         "ranks meet; see that torchrun runs there and can be reached") from None
    if rank:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # only the first rank speaks
    return device, rank, num_ranks

def num_ranks():
    return dist.get_world_size() if dist.is_initialized() else 1

def mesh_of_ranks(device):
    """All ranks in a row, for tensors to be split over."""
    return dist.init_device_mesh(device.split(":")[0], (num_ranks(),))

def from_rank(value, device, rank=0):
    """What one rank has, by default the first, as JSON can say it, on every rank."""
    message = torch.frombuffer(bytearray(json.dumps(value, default=str).encode()), dtype=torch.uint8).to(device)
    size = torch.tensor([len(message)], device=device)
    dist.broadcast(size, rank)
    message = message if dist.get_rank() == rank else torch.empty(size.item(), dtype=torch.uint8, device=device)
    dist.broadcast(message, rank)
    return json.loads(bytes(message.cpu().tolist()))

def first_of_ranks(value, device):
    """The value of the first rank that has another than None, on every rank; else None."""
    first = torch.tensor([num_ranks() if value is None else dist.get_rank()], device=device)
    dist.all_reduce(first, dist.ReduceOp.MIN)
    return from_rank(value, device, first.item()) if first.item() < num_ranks() else None

def of_first_rank(tensor):
    """A tensor that each rank has, with the first rank's numbers in it."""
    if dist.is_initialized():
        dist.broadcast(tensor, 0)
    return tensor

def sum_over_ranks(tensor):
    """The sum over all ranks of a tensor that each has."""
    if not dist.is_initialized():
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total

def agree(loss, asked):
    """The mean loss of all ranks, and how many were asked to stop, so that all do the same: scalars on the device."""
    loss = loss.double()
    loss, asked = sum_over_ranks(torch.stack((loss, torch.full_like(loss, asked)))).unbind()
    return loss / num_ranks(), asked
