"""The typed experiment config: every setting of a run, with its unit and where its value comes from.

A recipe (a function in `experiments/`) returns one `ExperimentConfig`; `emu2_jax.overrides` changes leaves of it from
gin-style lines; `validate` checks what crosses fields. *Paper* is arXiv 2312.13286v2; *release* is the authors' public
inference code. **open** marks a value that neither states: it is this project's choice, and a setting.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from emu2_jax.errors import ConfigError

#: The parts a parameter can belong to: the top-level keys of the parameter tree.
Part = Literal["visual_encoder", "project_up", "language_model", "project_down", "unet", "temporal", "vae"]

#: What a layer keeps for its backward pass, which computes the rest again (`emu2_jax.models.stack`).
Remat = Literal["none", "dots", "dots_with_context", "context", "offload", "full"]

#: What a sample of a source is made of, and what sequence it becomes (docs/data.md).
SampleKind = Literal["image_text", "video_text", "interleaved", "grounded", "text"]

_CAPTION = re.compile(r"(?!json$)[\w-]+(\.[\w-]+)*")


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The visual encoder. Defaults: EVA-02-CLIP-E-plus at 448 px (paper section 2.1; release).

    The last six settings are how the ViTs of the CLIP family differ; docs/parity.md lists which model has which.
    """

    image_size: int = 448  #: pixels, side of the square input. 224 in stage 1a.
    patch_size: int = 14  #: pixels
    width: int = 1792  #: channels of the residual stream, and of a visual embedding
    num_layers: int = 64
    num_heads: int = 16
    mlp_width: int = 15360  #: int(1792 x 8.571428571428571)
    layer_norm_epsilon: float = 1e-6
    block_norm: Literal["post", "pre"] = "post"  #: x + norm(f(x)), or x + f(norm(x))
    activation: Literal["gelu", "quick_gelu"] = "gelu"  #: exact (erf) GELU, or OpenAI CLIP's x * sigmoid(1.702 x)
    k_bias: bool = False  #: q and v always have biases; in EVA k has none
    patch_bias: bool = True  #: of the patch embedding
    input_norm: bool = False  #: a norm between the position embedding and the first block
    final_norm: bool = False  #: a norm after the last block

    @property
    def grid_size(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """The LLaMA decoder. Defaults: LLaMA-33B with the vocabulary of the Emu2 base release."""

    vocab_size: int = 32272  #: 32000 pieces + 272 special tokens (32274 in Emu2-Chat)
    width: int = 6656  #: channels of the residual stream
    num_layers: int = 60
    num_heads: int = 52
    num_kv_heads: int = 52  #: equal to num_heads: no grouped-query attention
    mlp_width: int = 17920  #: inner channels of SwiGLU
    rms_norm_epsilon: float = 1e-6
    rope_base: float = 10000.0
    attention_head_width: int | None = None  #: channels of one attention head; None = width / num_heads
    qkv_bias: bool = False  #: biases on q, k and v (Qwen2)
    tied_head: bool = False  #: the output head is the token embedding, transposed

    @property
    def head_width(self) -> int:
        """Channels of one attention head."""
        return self.width // self.num_heads if self.attention_head_width is None else self.attention_head_width


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Visual encoder, connector and language model, and how they are computed."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    num_visual_tokens: int = 64  #: N, embeddings per image after pooling; a square number (paper: 64 = 8 x 8)
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"  #: of products; norms, softmax, losses are float32
    frozen_dtype: Literal["float32", "bfloat16"] = "bfloat16"  #: storage of parts that do not train
    remat: Remat = "full"  #: what the backward pass computes again, see docs/performance.md
    vision_remat: Remat | None = None  #: of the visual encoder alone; None = remat
    attention: Literal["auto", "plain", "splash", "cudnn"] = "auto"  #: kernel; auto = the device's own: splash on TPU


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The one next-element loss (paper section 2.2.1) and everything about it that the paper leaves open."""

    text_loss_weight: float = 1.0
    regression_loss_weight: float = 1.0  #: **open**; 0 = captioning, text only, as in stage 1
    regression_cosine_weight: float = 0.0  #: **open**; adds this times (1 - cosine) to the squared error
    supervise_image_start: bool = True  #: **open**; whether predicting [IMG] carries loss (Emu1: no)
    supervise_image_end: bool = True  #: **open**; whether predicting [/IMG] carries loss (Emu1: no)
    regress_image_end: bool = False  #: **open**; Emu1's N+1st target: regress the [/IMG] token embedding
    visual_input_noise: float = 0.0  #: std of noise on visual inputs, relative to their own std; against exposure bias
    vocab_block_positions: int | None = 512  #: positions of a row whose logits exist at once; None = all


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One stream of samples in webdataset tar shards."""

    name: str  #: unique; override paths say data.sources.<name>.weight
    kind: SampleKind  #: layout of a sample, see docs/data.md
    shards: str  #: path with braces or globs: data/pairs-{000000..000007}.tar, data/pairs-*.tar
    weight: float = 1.0  #: share of steps (one_source_per_step) or of rows (mixed), relative to the other sources
    batch_rows: int | None = None  #: rows of a step drawn from this source alone; None = data.global_batch_rows
    image_slots: int | None = None  #: image slots of a row of this source alone; None = data.image_slots
    max_document_positions: int | None = None  #: cut of this source alone; None = data's (paper MMC4: 1024)
    caption: str = "txt"  #: of image_text and video_text: suffix of the text's member, or json.FIELD of its .json
    video_frames: int = 8  #: of video_text: frames sampled from each video (paper: 8)
    images_per_document: int | None = None  #: of interleaved: images sampled, each with its text; None = all (MMC4: 8)
    embeddings: str | None = None  #: directory that `emu2 encode` wrote for these shards, read in place of pixels


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, how it becomes packed rows, and how sources are mixed."""

    sources: tuple[SourceConfig, ...] = ()
    tokenizer: str = ""  #: path of a SentencePiece model
    special_tokens: Literal["base", "chat"] = "base"  #: Emu2's 272 after the model's pieces, or Emu2-Chat's 274
    row_length: int = 2048  #: L, positions per packed row (paper: sequences of 2048)
    image_slots: int = 24  #: M, images that a packed row can hold
    global_batch_rows: int = 8  #: B, packed rows per optimiser step over all hosts
    mixing: Literal["one_source_per_step", "mixed"] = "mixed"  #: paper's arithmetic: one_source_per_step
    image_first_probability: float = 0.5  #: image before its text (paper stage 2: 0.5; captioning: 1)
    phrase_first_probability: float = 0.7  #: of grounded: phrase before its boxes (paper: 0.7, **open** which way)
    max_document_positions: int | None = None  #: documents are cut here; None = row_length
    image_decoding: Literal["faithful", "fast"] = "faithful"  #: JPEGs in full; or by halves, not below the target
    apply_exif_orientation: bool = False  #: **open**; turn pictures as their EXIF says (release: no)
    packing_pool: int = 256  #: samples among which the packer chooses
    shuffle_window: int | None = None  #: samples that change places with each other; None = all of an epoch
    shuffle_run: int = 16  #: with shuffle_window: neighbouring samples that go into a window together
    index_dir: str | None = None  #: path or URL for indexes; None = beside the shards, else ~/.cache/emu2_jax/index
    damaged_shards: Literal["stop", "salvage"] = "stop"  #: salvage: use what is left of a cut or damaged shard
    read_attempts: int = 8  #: behind URLs: how often a failing read is tried, with growing pauses
    read_timeout_s: float = 60.0  #: behind URLs: seconds after which a read has failed
    read_ahead_mb: int = 512  #: behind URLs, with shuffle_window: megabytes kept for samples that come soon
    read_threads: int = 2  #: threads that read and decode
    prefetch_batches: int = 2  #: batches ready ahead of the step
    max_bad_share: float = 0.01  #: the run stops when more than this share of samples cannot be used
    seed: int = 0  #: order of samples; epochs and sources hash their own seeds from it


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with per-part learning rates. Defaults: paper stage 2."""

    learning_rate: float = 1e-5  #: peak; of every part without its own below
    visual_encoder_learning_rate: float | None = None  #: paper stage 1: 5e-5
    connector_learning_rate: float | None = None  #: project_up and project_down; paper stage 1: 1e-4
    language_model_learning_rate: float | None = None  #: paper stage 1: 3e-5
    temporal_learning_rate: float | None = None  #: of the video decoder's layers of time; **open**
    frozen: tuple[Part, ...] = ()  #: parts that do not train: no gradients, no moments
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  #: decay after the warm-up
    warmup: Literal["linear", "log"] = "linear"  #: how the rate rises; log: fast, then slow (**open** by which formula)
    warmup_ratio: float = 0.0  #: share of train.num_steps in which the learning rate rises to its peak
    warmup_steps: int | None = None  #: overrides warmup_ratio
    final_learning_rate_ratio: float = 0.0  #: end of the decay, relative to the peak
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-6
    weight_decay: float = 0.0  #: **open** in pretraining; matrices only, never norms or biases
    clip_norm: float | None = 5.0  #: global gradient norm over all trained parts; None = no clipping
    accumulation_steps: int = 1  #: micro-batches per step; the result equals one big batch
    micro_batch_rows: int | None = None  #: in place of that: as many as keep a device to this many rows at once
    gradient_dtype: Literal["float32", "bfloat16"] | None = None  #: of sums over devices; None = model.compute_dtype
    moment_dtype: Literal["float32", "bfloat16"] = "float32"  #: of Adam's first moment
    ema_decay: float | None = None  #: **open**; a moving average of the trained parts, handed on in their place


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices lie along each mesh axis; the product is the number of devices."""

    data: int = 1  #: replicas of the parameters (across slices on pods)
    fsdp: int | None = None  #: shards of parameters and batch; None = all devices that are left
    tensor: int = 1  #: shards of heads, MLP and vocabulary


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop."""

    task: Literal["pretrain", "decoder", "video_decoder"] = "pretrain"  #: what is trained: Emu2, or one that draws
    num_steps: int = 1000
    seed: int = 0  #: initial parameters and every draw inside a step
    log_every_steps: int = 10  #: a line of metrics.jsonl; every step is checked for finite losses all the same
    init_from: str | None = None  #: work directory of an earlier stage; the parts it has are taken over
    profile_steps: tuple[int, int] | None = None  #: write a profiler trace: first step, number of steps


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When state is saved. A last checkpoint is always written."""

    every_steps: int = 500
    keep: int | None = 2  #: newest checkpoints kept; None = all
    asynchronous: bool = True  #: training goes on while a checkpoint is written


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """A U-Net of the SDXL or Stable Diffusion 2 family. Defaults: Emu2's decoder (release `unet/config.json`)."""

    in_channels: int = 4  #: latent channels
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280)
    layers_per_block: int = 2
    transformer_layers_per_block: tuple[int, ...] = (0, 2, 10)  #: 0 = no attention at that level
    mid_transformer_layers: int | None = None  #: at the bottom; None = those of the last level (SD 2.1: 1, above none)
    num_attention_heads: tuple[int, ...] = (5, 10, 20)
    cross_attention_width: int = 1792  #: width of a visual embedding
    micro_conditions: bool = True  #: the network is told sizes, crop and the pooled condition (SD 2.1: no)
    pooled_width: int | None = None  #: of the pooled condition; None = cross_attention_width: the embeddings' mean
    time_id_width: int = 256  #: sinusoidal channels of each of the six micro-conditions
    norm_groups: int = 32
    norm_epsilon: float = 1e-5  #: GroupNorm of the residual blocks (release: 1e-5)
    transformer_norm_epsilon: float = 1e-6  #: GroupNorm at a transformer's input (release: 1e-6)
    condition_radius: float | None = None  #: cells; cross-attention falls off with distance on the image; None = SDXL


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """An AutoencoderKL. Defaults: SDXL's, which is Emu2's (release `vae/config.json`)."""

    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)  #: each level but the last halves the image
    layers_per_block: int = 2  #: residual blocks per level of the encoder; the decoder has one more
    norm_groups: int = 32
    norm_epsilon: float = 1e-6


@dataclass(frozen=True, kw_only=True)
class VideoConfig:
    """The video decoder: what stands between the frames of a clip (train.task = video_decoder). All **open**."""

    num_frames: int = 8  #: T, frames of a clip, which are drawn together
    frames_per_second: float | None = None  #: of what is read and drawn; None = T frames, evenly over a whole video
    kernel_frames: int = 3  #: frames that a convolution over time reads; odd
    attention: Literal["axial", "joint"] = "axial"  #: a position sees itself, or every position, in all the frames
    batch_clips: int = 256  #: clips per optimiser step over all hosts


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The visual decoder: a diffusion model on frozen visual embeddings (paper section 2.3 and table 7)."""

    unet: UNetConfig = field(default_factory=UNetConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)  #: of decoder.latent = autoencoder_kl
    video: VideoConfig = field(default_factory=VideoConfig)  #: of train.task = video_decoder
    latent: Literal["space_to_depth", "cosines", "autoencoder_kl"] = "autoencoder_kl"  #: between pixels and latents
    latent_factor: int = 8  #: pixels per latent position along one side
    latent_scale: float = 0.13025  #: latents are multiplied by this (SDXL's VAE)
    image_size: int = 1024  #: pixels, side of the square that is drawn
    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    prediction: Literal["epsilon", "v_prediction", "sample"] = "epsilon"  #: what the U-Net gives; paper: the noise
    zero_terminal_snr: bool = False  #: rescale the schedule so that the last timestep is noise alone (paper: no)
    timestep_spacing: Literal["leading", "trailing", "linspace"] = (
        "leading"  #: sampling starts short of the end, or at it
    )
    steps_offset: int = 1  #: added to the timesteps of "leading" spacing (release `scheduler_config.json`)
    noise_offset: float = 0.1  #: std of a shift of the noise shared by all positions of a channel
    min_snr_gamma: float | None = None  #: min-SNR loss weighting; None = off (paper)
    condition_dropout: float = 0.1  #: share of samples trained on the null condition
    num_sampling_steps: int = 50
    guidance_scale: float = 3.0  #: 1 = no guidance
    batch_images: int = 2048  #: images per optimiser step over all hosts
    vae_chunks: int = 1  #: the VAE takes a (micro-)batch in this many chunks, one after the other, to save memory
    min_image_side: int | None = None  #: pixels; pictures with a shorter side are left out (paper: 512); None = none
    random_scale_max: float = 1.25  #: **open**; ratio-preserving scale is drawn from [1, this], then a square crop


#: OpenAI's CLIP ViT-L/14.
CLIP_VIT_L = VisionConfig(
    image_size=224,
    patch_size=14,
    width=1024,
    num_layers=24,
    num_heads=16,
    mlp_width=4096,
    layer_norm_epsilon=1e-5,
    block_norm="pre",
    activation="quick_gelu",
    k_bias=True,
    patch_bias=False,
    input_norm=True,
    final_norm=True,
)


@dataclass(frozen=True, kw_only=True)
class FewShotConfig:
    """Few-shot evaluation on a benchmark (paper appendix E), by `emu2 evaluate --suite few_shot`; docs/few-shot.md.

    A setting that is None is as the named task has it.
    """

    task: str = "vqav2"  #: whose prompts, fields and score; `emu2_jax/evaluation/few_shot_tasks.py` names them
    queries: str = ""  #: what is asked: shards, or tfds:DATASET@SPLIT
    support: str = ""  #: where examples are taken from, likewise; 0 shots need none
    shots: tuple[int, ...] = (0, 4, 8, 16)  #: examples in the prompt (paper)
    selection: Literal["rices", "random"] = "rices"  #: the most similar images (paper), or any
    most_similar_last: bool = True  #: **open**; the nearest example stands next to the query
    seed: int = 0  #: **open**; of random examples, of num_queries and num_support, of one among an image's questions
    num_queries: int | None = None  #: questions that are asked, drawn by the seed; None = all
    num_support: int | None = None  #: images that examples are taken from, drawn by the seed; None = all
    features: str | None = None  #: directory of queries*.npz and support*.npz; None = this run's encoder (**open**)
    features_encoder: str | None = None  #: who made them, as the files say, where it is not this run's encoder
    items: str | None = None  #: field of a sample's .json that lists several questions about its image
    question: str | None = None  #: field of the question
    answer: str | None = None  #: field of the true answer (answers, captions, label, box)
    box_form: Literal["xyxy", "yxyx", "xyxy_pixels", "xywh_pixels"] | None = None  #: how boxes are written
    prompt: str | None = None  #: of examples and query; {image} and fields in braces
    zero_shot_prompt: str | None = None  #: of the query without examples
    separator: str = ". "  #: between examples (paper); an answer ends at it
    max_tokens: int | None = None  #: longest answer, tokens
    beams: int = 5  #: 1 = greedy (release: 5)
    length_penalty: float | None = None  #: of beams (release, short answers: -1)
    batch: int = 16  #: questions that are answered at once
    page_queries: int = 100  #: questions that the page shows, of each number of shots


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What the finished model is measured on."""

    scenes: str = ""  #: shards of held-out image-text pairs
    unseen: str = ""  #: shards of image-text pairs of objects never trained on
    num_samples: int = 256  #: pairs that are scored, from the front of each
    num_pictures: int = 8  #: pairs that are also drawn into the report
    max_text_tokens: int = 48  #: longest generated caption, tokens
    in_context: str = ""  #: shards of held-out episodes, of `emu2 evaluate --suite in_context`
    shots: tuple[int, ...] = (0, 1, 2, 4, 8)  #: examples in the prompt
    episodes_per_task: int = 128  #: from the front of the shards
    few_shot: FewShotConfig = field(default_factory=FewShotConfig)
    clip_weights: str | None = None  #: file or directory of CLIP's weights, for CLIP-I; None = not measured
    clip_vision: VisionConfig = field(default_factory=lambda: CLIP_VIT_L)  #: its image tower (paper: ViT-L)
    preview_every_steps: int | None = None  #: of the decoder: held-out pictures redrawn during training; None = never


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """Everything that decides what a run computes. Two runs of equal configs give equal bits."""

    name: str
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


def validate(config: ExperimentConfig) -> ExperimentConfig:
    """Check what crosses fields, before anything is allocated or compiled. Returns the config unchanged.

    Raises `ConfigError`; the message starts with the dotted path of the setting to change.
    """
    vision, language = config.model.vision, config.model.language
    widths = ("width", "num_layers", "num_heads", "mlp_width")
    _require_positive(vision, "model.vision", "image_size", "patch_size", *widths)
    _require_positive(language, "model.language", "vocab_size", "num_kv_heads", *widths)
    _require_positive(config.model, "model", "num_visual_tokens")
    side = round(config.model.num_visual_tokens**0.5)
    _require(vision.image_size % vision.patch_size == 0, "model.vision.image_size", "is not a multiple of patch_size")
    _require(vision.width % vision.num_heads == 0, "model.vision.width", "does not divide over num_heads")
    _require(side * side == config.model.num_visual_tokens, "model.num_visual_tokens", "is not a square number")
    _require(
        side <= vision.grid_size and vision.grid_size % side == 0,
        "model.num_visual_tokens",
        f"cannot be pooled from a {vision.grid_size} x {vision.grid_size} patch grid: take k x k with k a divisor",
    )
    head_width = language.attention_head_width
    _require(head_width is None or head_width >= 1, "model.language.attention_head_width", "must be at least 1")
    if head_width is None:
        _require(language.width % language.num_heads == 0, "model.language.width", "does not divide over num_heads")
    path = f"model.language.{'num_heads' if head_width is None else 'attention_head_width'}"
    _require(language.head_width % 2 == 0, path, "gives an odd head width; rotary needs pairs")
    _require(language.num_heads % language.num_kv_heads == 0, "model.language.num_kv_heads", "must divide num_heads")
    _require_positive(config.train, "train", "num_steps", "log_every_steps")
    profiled = config.train.profile_steps
    _require(
        profiled is None or min(profiled) >= 1, "train.profile_steps", "must be a first step and a number of steps"
    )
    _require_positive(config.checkpoint, "checkpoint", "every_steps")
    _require(config.checkpoint.keep is None or config.checkpoint.keep >= 1, "checkpoint.keep", "must be at least 1")
    _require(config.evaluation.num_samples >= 2, "evaluation.num_samples", "must be at least 2")
    _require_positive(config.evaluation, "evaluation", "num_pictures", "max_text_tokens", "episodes_per_task")
    shots = config.evaluation.shots
    _require(
        bool(shots) and min(shots) >= 0, "evaluation.shots", "must be numbers of examples, 0 or more, at least one"
    )
    _validate_few_shot(config.evaluation.few_shot)
    every = config.evaluation.preview_every_steps
    _require(every is None or every >= 1, "evaluation.preview_every_steps", "must be at least 1; None = no previews")
    block = config.objective.vocab_block_positions
    _require(block is None or block >= 1, "objective.vocab_block_positions", "must be at least 1; None = all at once")
    _validate_optimizer(config)
    _validate_data(config)
    if config.train.task != "pretrain":
        _validate_decoder(config)
    if config.train.task == "video_decoder":
        _validate_video(config.decoder.video)
    return config


def _validate_few_shot(few_shot: FewShotConfig) -> None:
    path, shots = "evaluation.few_shot", few_shot.shots
    sensible = bool(shots) and min(shots) >= 0 and len(set(shots)) == len(shots)
    _require(sensible, f"{path}.shots", "must be different numbers of examples, 0 or more, at least one")
    _require_positive(few_shot, path, "beams", "batch", "page_queries")
    for name in ("num_queries", "num_support", "max_tokens"):
        value = getattr(few_shot, name)
        _require(value is None or value >= 1, f"{path}.{name}", "must be at least 1")
    _require(few_shot.seed >= 0, f"{path}.seed", "must not be negative")
    _require(bool(few_shot.separator.strip()), f"{path}.separator", "must hold more than white space")


def _validate_optimizer(config: ExperimentConfig) -> None:
    optimizer = config.optimizer
    _require_positive(optimizer, "optimizer", "accumulation_steps")
    rows = optimizer.micro_batch_rows
    _require(rows is None or rows >= 1, "optimizer.micro_batch_rows", "must be at least 1; None = accumulation_steps")
    both = rows is not None and optimizer.accumulation_steps > 1
    _require(
        not both, "optimizer.micro_batch_rows", "says how many micro-batches there are; leave accumulation_steps 1"
    )
    other = rows is not None and config.train.task != "pretrain"
    _require(not other, "optimizer.micro_batch_rows", "is for pretraining; a decoder takes accumulation_steps")
    _require(0 <= optimizer.warmup_ratio < 1, "optimizer.warmup_ratio", "must lie in [0, 1)")
    decay = optimizer.ema_decay
    _require(decay is None or 0 < decay < 1, "optimizer.ema_decay", "must lie in (0, 1), 0.9999 say; None = no average")
    warmup = optimizer.warmup_steps or 0
    _require(0 <= warmup <= config.train.num_steps, "optimizer.warmup_steps", "must lie between 0 and train.num_steps")
    prefixes = ("", "visual_encoder_", "connector_", "language_model_", "temporal_")
    for name in (f"{prefix}learning_rate" for prefix in prefixes):
        value = getattr(optimizer, name)
        _require(value is None or value >= 0, f"optimizer.{name}", "must not be negative")
    decoder = config.train.task != "pretrain"
    temporal = ("temporal",) if config.train.task == "video_decoder" else ()
    vae = ("vae",) if config.decoder.latent == "autoencoder_kl" else ()
    parts: tuple[str, ...] = ("visual_encoder", "project_up", "project_down", "language_model")
    parts = ("visual_encoder", "unet", *temporal, *vae) if decoder else parts
    _require(bool(set(parts) - set(optimizer.frozen)), "optimizer.frozen", "leaves nothing to train")
    _require(set(optimizer.frozen) <= set(parts), "optimizer.frozen", f"names a part that is not of {', '.join(parts)}")
    _require(
        not decoder or "visual_encoder" in optimizer.frozen,
        "optimizer.frozen",
        "must hold visual_encoder: the decoder trains on frozen embeddings",
    )
    _require(
        not (decoder and vae) or "vae" in optimizer.frozen,
        "optimizer.frozen",
        "must hold vae: the decoder trains on the latents of a frozen VAE",
    )
    _require(
        decoder or bool(config.objective.regression_loss_weight) or "project_down" in optimizer.frozen,
        "optimizer.frozen",
        "must hold project_down: with objective.regression_loss_weight = 0 nothing trains it",
    )


def _validate_data(config: ExperimentConfig) -> None:
    data = config.data
    names = [source.name for source in data.sources]
    for name in names:
        _require(names.count(name) == 1, f"data.sources.{name}", "is there twice; names must differ")
    for source in data.sources:
        path = f"data.sources.{source.name}"
        _require(source.weight >= 0, f"{path}.weight", "must not be negative; 0 leaves the source out")
        slots = data.image_slots if source.image_slots is None else source.image_slots
        rows = source.batch_rows
        _require(rows is None or rows >= 1, f"{path}.batch_rows", "must be at least 1")
        _validate_source(config, source, path)
        _require(source.kind == "text" or slots > 0, f"{path}.image_slots", "must be positive for a kind with images")
        _require(
            source.embeddings is None or "visual_encoder" in config.optimizer.frozen,
            f"{path}.embeddings",
            "needs visual_encoder in optimizer.frozen: what is stored cannot follow an encoder that trains",
        )
        _require(
            source.embeddings is None or source.kind in ("image_text", "interleaved", "grounded"),
            f"{path}.embeddings",
            f"is for sources of images that stay the same from epoch to epoch; {source.kind} has none",
        )
        own_rows = source.batch_rows is not None or source.image_slots is not None
        _require(
            data.mixing == "one_source_per_step" or not own_rows,
            f"{path}.{'batch_rows' if source.batch_rows is not None else 'image_slots'}",
            'is for data.mixing = "one_source_per_step"; in a mixed batch all rows have one shape',
        )
    needed = config.model.num_visual_tokens + 4  # <s> [IMG] ... [/IMG] </s>
    _require(data.row_length >= needed, "data.row_length", f"cannot hold one image; needs at least {needed}")
    limit = data.max_document_positions
    _require(
        limit is None or needed <= limit <= data.row_length,
        "data.max_document_positions",
        f"must lie between {needed}, which hold one image, and data.row_length",
    )
    _require_positive(data, "data", "global_batch_rows", "packing_pool", "shuffle_run", "read_attempts")
    window = data.shuffle_window
    _require(window is None or window >= data.shuffle_run, "data.shuffle_window", "must be at least data.shuffle_run")
    _require(data.read_timeout_s > 0, "data.read_timeout_s", "must be positive")
    _require(data.read_ahead_mb >= 0, "data.read_ahead_mb", "must not be negative")
    _require(0 <= data.image_first_probability <= 1, "data.image_first_probability", "must lie in [0, 1]")
    _require(0 <= data.phrase_first_probability <= 1, "data.phrase_first_probability", "must lie in [0, 1]")
    _require(0 <= data.max_bad_share <= 1, "data.max_bad_share", "must lie in [0, 1]")
    _require(data.read_threads >= 0, "data.read_threads", "must not be negative")
    _require(data.prefetch_batches >= 0, "data.prefetch_batches", "must not be negative")


def _validate_source(config: ExperimentConfig, source: SourceConfig, path: str) -> None:
    """What a kind needs, and settings that are for another kind."""
    data, kind = config.data, source.kind
    one_image = config.model.num_visual_tokens + 2
    limit = source.max_document_positions
    _require(
        limit is None or one_image + 2 <= limit <= data.row_length,
        f"{path}.max_document_positions",
        f"must lie between {one_image + 2}, which hold one image, and data.row_length",
    )
    _require(
        bool(_CAPTION.fullmatch(source.caption)),
        f"{path}.caption",
        "must be the suffix of a member (txt) or json.FIELD, in letters, digits, _ and -",
    )
    of_pairs = kind in ("image_text", "video_text")
    _require(source.caption == "txt" or of_pairs, f"{path}.caption", f"is for image_text and video_text, not {kind}")
    images = source.images_per_document
    _require(images is None or images >= 1, f"{path}.images_per_document", "must be at least 1; None = all")
    _require(images is None or kind == "interleaved", f"{path}.images_per_document", f"is for interleaved, not {kind}")
    _require(source.video_frames >= 1, f"{path}.video_frames", "must be at least 1")
    if kind != "video_text" or config.train.task != "pretrain":  # of a video decoder: decoder.video
        return
    slots = data.image_slots if source.image_slots is None else source.image_slots
    frames, needed = source.video_frames, 3 + source.video_frames * one_image  # <s> [VIDEO] ... </s>
    _require(frames <= slots, f"{path}.video_frames", f"are {frames}, more than the {slots} image slots of a row")
    room = limit or data.max_document_positions or data.row_length
    _require(room >= needed, f"{path}.video_frames", f"need {needed} positions, more than the {room} of a document")


def _validate_decoder(config: ExperimentConfig) -> None:
    decoder, unet, vae = config.decoder, config.decoder.unet, config.decoder.vae
    levels = len(unet.block_out_channels)
    for field_name in ("transformer_layers_per_block", "num_attention_heads"):
        path = f"decoder.unet.{field_name}"
        _require(len(getattr(unet, field_name)) == levels, path, f"needs {levels} entries, one per level of the U-Net")
    _require_positive(decoder, "decoder", "latent_factor", "num_sampling_steps", "num_train_timesteps", "batch_images")
    _require_positive(decoder, "decoder", "vae_chunks")
    clips = config.train.task == "video_decoder"
    images = decoder.video.batch_clips * decoder.video.num_frames if clips else decoder.batch_images
    images //= config.optimizer.accumulation_steps
    _require(images % decoder.vae_chunks == 0, "decoder.vae_chunks", f"must divide the {images} images of a batch")
    least = decoder.min_image_side
    _require(least is None or least >= 1, "decoder.min_image_side", "must be at least 1; None = no picture is left out")
    _require(0 <= decoder.condition_dropout <= 1, "decoder.condition_dropout", "must lie in [0, 1]")
    _require(decoder.steps_offset >= 0, "decoder.steps_offset", "must not be negative")
    if decoder.latent == "autoencoder_kl":
        _require_positive(vae, "decoder.vae", "latent_channels", "layers_per_block", "norm_groups")
        groups = vae.norm_groups
        divides = bool(vae.block_out_channels) and all(width % groups == 0 for width in vae.block_out_channels)
        _require(divides, "decoder.vae.block_out_channels", f"must be multiples of decoder.vae.norm_groups = {groups}")
        factor = 2 ** (len(vae.block_out_channels) - 1)
        _require(decoder.latent_factor == factor, "decoder.latent_factor", f"must be {factor}, as decoder.vae has it")
    multiple = decoder.latent_factor * 2 ** (levels - 1)
    below = decoder.image_size // multiple * multiple
    nearest = f"{below} or {below + multiple}" if below else f"{multiple}"
    _require(
        decoder.image_size % multiple == 0,
        "decoder.image_size",
        f"is {decoder.image_size}, which the {levels} levels of the U-Net cannot halve: must be a multiple of "
        f"{multiple}; nearest: {nearest}",
    )
    _require(
        unet.cross_attention_width == config.model.vision.width,
        "decoder.unet.cross_attention_width",
        f"must equal model.vision.width = {config.model.vision.width}, the width of a visual embedding",
    )


def _validate_video(video: VideoConfig) -> None:
    _require(
        video.num_frames >= 2, "decoder.video.num_frames", "must be at least 2; one image is for train.task = decoder"
    )
    _require_positive(video, "decoder.video", "kernel_frames", "batch_clips")
    _require(video.kernel_frames % 2 == 1, "decoder.video.kernel_frames", "must be odd: as many frames before as after")
    rate = video.frames_per_second
    _require(rate is None or rate > 0, "decoder.video.frames_per_second", "must be positive; None = the whole video")


def _require(condition: bool, path: str, message: str) -> None:
    if not condition:
        raise ConfigError(f"{path}: {message}")


def _require_positive(section: object, path: str, *names: str) -> None:
    for name in names:
        _require(getattr(section, name) >= 1, f"{path}.{name}", "must be at least 1")
