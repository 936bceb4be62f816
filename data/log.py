"""What a run measured: on the terminal, in metrics.jsonl, and in Weights & Biases where asked."""

import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

import tinylm
from data import cli, files, machine
from data.cli import InputError, one_line, say
from data.run import checkpoints, newest, own_folder

RISES = 3  # of the validation loss in a row, before a run says so
SAMPLES = 100  # the last ones, that W&B has in a table, of which it sends all each time
PATIENCE = 5  # steps in a row whose numbers are not finite, before a run gives up

class Diverged(RuntimeError):
    """Training whose loss or gradients are no numbers any more."""

    exit_code = 3

def import_wandb():
    try:
        import wandb
    except ImportError:
        raise InputError("--use_wandb needs the package wandb; pip install wandb, or leave the flag out") from None
    except Exception as error:  # as where it does not go with other packages
        raise InputError(f"--use_wandb: wandb can't be imported ({one_line(error)}); install it anew, or "
                         "leave the flag out") from None
    return wandb

def check_wandb():
    """Raise InputError where W&B can't be reached, or doesn't know the user, before any work goes into a run."""
    wandb = import_wandb()
    try:
        if wandb.setup().settings.mode == "online":
            wandb.login()
    except Exception as error:  # of W&B's many kinds
        raise wandb_error(error) from None

def wandb_error(error):
    instead = "leave out --use_wandb" if os.environ.get("WANDB_MODE") == "offline" else (
        "set WANDB_MODE=offline to keep what it gets in the run's folder for later")
    return InputError(f"W&B can't be used ({one_line(error)}); see to that, or {instead}")

def describe(run):
    """What a run is, for W&B: its flags, the model's size, the device, versions and the commit of this code."""
    device = run.settings.device
    git, here = shutil.which("git"), Path(__file__).parent  # without git or a repository the commit stays empty
    commit = git and subprocess.run([git, "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True).stdout
    device_name = torch.cuda.get_device_name(device) if device != "cpu" else platform.processor() or platform.machine()
    return cli.kept(run.settings) | {
        "num_params": tinylm.num_params(run.config), "num_ranks": run.num_ranks, "git_commit": (commit or "").strip(),
        "device_name": device_name, "python_version": platform.python_version(), "torch_version": torch.__version__}

def flops_per_token(config):
    """Floating-point operations to train on a token: 6 for each parameter, but none for those of an embedding,
    of which a row is looked up, and 12 · layers · heads · head_dim · context (Chowdhery et al. 2022, appendix B).
    """
    looked_up = 0 if config.tie_embeddings else config.vocab_size * config.d_model
    attention = 12 * config.num_layers * config.num_heads * config.head_dim * config.context_length
    return 6 * (tinylm.num_params(config) - looked_up) + attention

def introduce(run):
    """Say what is about to run."""
    settings, config, ids = run.settings, run.config, run.ids
    compiled = ", compiled in the first step, which takes a while" if settings.compile else ""
    sharded = ", sharded" if settings.shard else ""
    ranks = f", {run.num_ranks} ranks{sharded}" if torch.distributed.is_initialized() else ""
    targets = len(ids["val"]) - 1
    of_all = f"the first {settings.eval_tokens:,} of" if settings.eval_tokens < targets else "all"
    say(f"model       {tinylm.num_params(config):,} parameters: d_model {config.d_model}, "
        f"{config.num_layers} layers, {config.num_heads} heads, d_ff {config.d_ff}, "
        f"context {config.context_length}, vocabulary {config.vocab_size}")
    say(f"device      {settings.device}, {settings.dtype}{compiled}{ranks}")
    say(f"data        {run.data}: {len(ids['train']):,} tokens; validation on {of_all} {targets:,}")
    say(f"step        {settings.tokens_per_step:,} tokens; {run.step} of {settings.num_steps} steps done; "
        f"learning rate {settings.lr_max:.2e} to {settings.lr_min:.2e}")
    readings = f"{settings.epochs:,.0f}" if settings.epochs >= 10 else f"{settings.epochs:.2g}"
    decay = "" if settings.weight_decay is None else f"; weight decay {settings.weight_decay:.2g}"
    say(f"reads       the text {readings} times in all{decay}")
    if run.source and settings.epochs > 10:
        say(f"            which is often: a step reads {settings.batch_size} windows of {config.context_length:,} "
            "tokens, all that the model takes; --context_length gives shorter ones")
    say(f"writes to   {run.folder}")

class Overfitting:
    """Notices when the validation loss has risen RISES times in a row while the training loss fell."""

    def __init__(self):
        self.losses, self.evaluations, self.noticed = [], [], False

    def begins(self, measured):
        """Whether it is first seen with these measurements of a step."""
        if measured.get("train_loss") is not None:
            self.losses.append(measured["train_loss"])
        if measured.get("val_loss") is None or not self.losses:
            return False
        self.evaluations.append((measured["val_loss"], sum(self.losses) / len(self.losses)))
        self.losses = []
        validation, training = zip(*self.evaluations[-RISES - 1:])
        rises = all(a < b for a, b in zip(validation, validation[1:])) and training[-1] < training[0]
        begins = len(validation) > RISES and rises and not self.noticed
        self.noticed |= begins
        return begins

class Log:
    """Sends measurements to the terminal, metrics.jsonl and W&B until it is left; first it says what will run."""

    def __init__(self, run):
        introduce(run)
        self.run, self.settings = run, run.settings
        self.flops, peak = flops_per_token(run.config), machine.peak_flops(run.settings.device)
        self.peak_flops = peak and peak * run.num_ranks
        self.overfitting, self.samples = Overfitting(), []
        for line in [] if run.rank else files.json_lines(run.folder / "metrics.jsonl"):
            self.overfitting.begins(line)
            self.samples += [[line["step"], line["sample"]]] if line.get("sample") else []
        self.cut = False  # whether the last line could not be written
        self.screen = cli.Progress("training", stream=sys.stdout)
        self.wandb = import_wandb() if run.settings.use_wandb else None
        if self.wandb:
            try:
                self.wandb_run = self.wandb.init(
                    project=run.settings.wandb_project, name=run.folder.name, id=run.wandb_id, resume="allow",
                    dir=run.folder, config=describe(run))
            except Exception as error:
                raise wandb_error(error) from None
            run.wandb_id = self.wandb_run.id
        self.bad_steps, self.waiting = 0, []  # in a row; steps whose numbers nobody has looked at
        self.begin = self.mark = time.perf_counter()
        self.marked_step, self.steady_since = run.step, (self.begin, run.step)

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        self.screen.close()
        self.send(lambda: self.wandb_run.finish(exit_code=int(error is not None)))

    @property
    def seconds(self):
        """Seconds that the run took so far, with evaluations and checkpoints."""
        return self.run.seconds + time.perf_counter() - self.begin

    is_behind = property(lambda self: self.settings.device != "cpu")  # whether the device may be at work still

    def pause(self, step):
        """Leave out of tokens_per_second what happened since the last call of `training`."""
        self.mark, self.marked_step = time.perf_counter(), step

    def write(self, step, **measured):
        """Keep measurements of a step."""
        measured = {"step": step, "tokens": step * self.settings.tokens_per_step, "seconds": round(self.seconds, 3)} | {
            name: None if isinstance(value, float) and not math.isfinite(value) else value  # JSON has no other numbers
            for name, value in measured.items()}
        if not self.run.rank:
            self.keep(json.dumps(measured))
        self.is_overfitting = self.overfitting.begins(measured)
        sample = measured.pop("sample", None)
        self.samples += [[step, sample]] if sample else []
        table = lambda: {"samples": self.wandb.Table(["step", "text"], self.samples[-SAMPLES:])} if sample else {}
        self.send(lambda: self.wandb_run.log(measured | table(), step=step))

    def keep(self, line):
        """Add a line to metrics.jsonl. What is in its way costs lines, not the run, and is said once."""
        data = line.encode() + b"\n"
        try:  # opened each time, as it may be edited and its folder renamed
            with open(own_folder(self.run) / "metrics.jsonl", "a+b", buffering=0) as file:
                file.seek(-min(1, file.seek(0, os.SEEK_END)), os.SEEK_END)
                data = data if file.read(1) in (b"", b"\n") else b"\n" + data  # behind one that was cut short
                written, error = file.write(data), "the disk is full, or the file may not grow"
        except (OSError, InputError) as problem:
            written, error = 0, problem
        if written < len(data) and not self.cut:
            cli.fail(f"{self.run.folder}/metrics.jsonl could not be written ({error}); see to that, the run goes on")
        self.cut = written < len(data)

    def send(self, call):
        """Where asked, tell W&B. Losing it is said, and never ends a run."""
        if self.wandb:
            try:
                call()
            except Exception as error:  # of W&B's many kinds
                self.wandb = None
                cli.fail(f"W&B has failed ({one_line(error)}); the run goes on without it")

    def step(self, step, lr, numbers, at_once):
        """Take a step's numbers, a function → [loss, gradient norm, how many ranks were asked to stop].

        On a CPU, and where `at_once`, it looks at them now, else at those of the step before, while the device computes
        this one. → whether to stop.
        """
        self.waiting.append((step, lr, numbers, time.perf_counter()))
        held_back, is_asked = int(self.is_behind and not at_once), False
        while len(self.waiting) > (0 if is_asked else held_back):
            step, lr, numbers, now = self.waiting.pop(0)
            loss, norm, asked = numbers()
            is_asked |= asked > 0
            is_due = step % self.settings.log_interval == 0 or step == self.settings.num_steps
            if self.applied(step, loss, norm, lr) and is_due:
                self.training(step, loss, norm, lr, now)
            if step == self.run.step + 1:  # behind it the pace is steady, as all is compiled
                self.mark, self.marked_step, self.steady_since = now, step, (now, step)
        return is_asked

    def training(self, step, loss, norm, lr, now):
        """Keep and show the state of training, as it was when the host had done a step."""
        num_steps, (since, begin) = self.settings.num_steps, self.steady_since
        rate = (step - self.marked_step) * self.settings.tokens_per_step / max(1e-9, now - self.mark)
        self.mark, self.marked_step = now, step
        left = (num_steps - step) * (now - since) / (step - begin)
        share = {"flops_share": round(rate * self.flops / self.peak_flops, 4)} if self.peak_flops else {}
        self.write(step, train_loss=loss, lr=lr, grad_norm=norm, tokens_per_second=round(rate, 1),
                   **machine.peak_memory(self.settings.device), **share)
        self.screen.write(f"step {step}/{num_steps}  loss {loss:.4f}  lr {lr:.2e}  norm {norm:.2f}  "
                          f"{rate:,.0f} tokens/s  {cli.duration(left)} left")

    def evaluation(self, step, val_loss, sample):
        """Keep and show the state of the model."""
        bits_per_byte = val_loss / math.log(2) * (len(self.run.ids["val"]) - 1) / self.run.meta["val"]["bytes"]
        self.write(step, val_loss=val_loss, val_perplexity=math.exp(min(val_loss, 700)),
                   val_bits_per_byte=bits_per_byte, **{"sample": sample} if sample else {})
        self.screen.close()
        say(f"step {step}  validation loss {val_loss:.4f}  {bits_per_byte:.4f} bits per byte  "
            f"after {cli.duration(self.seconds)}")
        if sample:
            say(f"  it writes: {one_line(sample)}")
        if self.is_overfitting:
            say(f"  validation has risen {RISES} times while training fell: the model learns this text by heart; more "
                "text helps, or a larger --weight_decay, fewer --num_steps, a smaller --d_model")
        self.pause(step)

    def histograms(self, step, **trees):
        """Where asked, send each tensor's distribution to W&B, by tree and path; of a split one, this rank's rows."""
        histogram = lambda tensor: self.wandb.Histogram(tensor.float().cpu().numpy())
        if self.settings.wandb_histograms and not self.bad_steps:  # W&B has none of numbers that are not finite
            self.send(lambda: self.wandb_run.log({
                f"{name}/{path}": histogram(tensor) for name, tree in trees.items()
                for path, tensor in tinylm.tree_leaves(tinylm.own_parts(tree))}, step=step))

    def checkpoint(self, step):
        """Where asked, send the latest checkpoint to W&B."""
        def send():
            artifact = self.wandb.Artifact(f"{self.wandb_run.id}-checkpoint", "model", metadata={"step": step})
            artifact.add_dir(str(newest(self.run.folder)))
            self.wandb_run.log_artifact(artifact, aliases=["latest"] + ["best"] * (step == self.run.best_step))

        if self.settings.wandb_artifacts:
            self.send(send)

    def applied(self, step, loss, norm, lr):
        """Whether a step's numbers are finite, so that it was applied; else they are kept and shown.

        Raises Diverged after PATIENCE steps in a row that are not.
        """
        if math.isfinite(loss + norm):
            self.bad_steps = 0
            return True
        self.bad_steps += 1
        numbers = f"loss {loss}, gradient norm {norm}, learning rate {lr:.2e}"
        self.write(step, skipped=numbers)
        self.screen.close()
        say(f"step {step} is not applied: {numbers}")
        if self.bad_steps == PATIENCE:
            saved = {}
            with suppress(OSError):
                saved = checkpoints(self.run.folder)
            ruined, begin = saved.pop(step - PATIENCE, None), ""
            if saved:
                begin = f"remove {cli.quoted(ruined)}, after which no step can be applied, and " if ruined else ""
                flags = self.run.flags_to_resume(lr_max=f"{self.settings.lr_max / 2:.2g}")
                begin += f"go on from {saved[max(saved)].name} with {flags}, or "
            raise Diverged(f"{PATIENCE} steps in a row were not finite, the last at step {step}: {numbers}; {begin}"
                           "start anew with a smaller --lr_max or a longer --warmup_steps"
                           + ", or in --dtype=float32" * (self.settings.dtype != "float32"))
        return False
