"""COCO 2017: Faster R-CNN with FPN, the paper's detection table: WKD-L, WKD-F, both, and every rival.

    python -m wkd_jax.main --config coco_wkd:pair=r101_r18,method=wkd_lf,data_dir=/data/coco
    python -m wkd_jax.main --config coco_wkd:pair=r50_mv2,method=dkd+reviewkd,source=tfds,test_json=val.json

Arguments:
  pair        r101_r18 (the default), r50_mv2 or r101_r50
  method      wkd_l, wkd_f, wkd_lf: both (the default), wkd_lf_box: both and the distillation of boxes; rivals: none
              (labels alone), kd, dkd, fitnet, fgfi, icd, reviewkd, dkd+reviewkd, fcfd
  source      folder (the default): train2017/, val2017/ and annotations/ in data_dir; tfds: coco/2017 of TensorFlow
              Datasets
  data_dir    where that is; default: ./coco, or for tfds TensorFlow Datasets' own
  test_json   tfds: path of COCO's instances_val2017.json, the ground truth
  norm_quirk  fixed (the default): every network is fed as it was trained; reference: as the code behind the published
              numbers feeds it, see below
  batch       images a step, default 8; with another, rate, steps, milestones, warm-up and the delays of fgfi and icd
              are scaled in proportion, which is no longer the published schedule
  seed        default 0

Expected AP / AP50 / AP75 on val2017, %; one run each [P]:
                            r101_r18                r50_mv2
  teacher                   42.04 / 62.48 / 45.88   40.22 / 61.02 / 43.81
  none                      33.26 / 53.61 / 35.26   29.47 / 48.87 / 30.90
  kd                        33.97 / 54.66 / 36.62   30.13 / 50.28 / 31.35
  dkd                       35.05 / 56.60 / 37.54   32.34 / 53.77 / 34.01
  wkd_l                     35.24 / 56.73 / 37.91   32.48 / 53.85 / 34.21
  fitnet                    34.13 / 54.16 / 36.71   30.20 / 49.80 / 31.69
  fgfi                      35.44 / 55.51 / 38.17   31.16 / 50.68 / 32.92
  icd                       35.90 / 56.02 / 38.75   32.88 / 52.56 / 34.93
  reviewkd                  36.75 / 56.72 / 34.00   33.71 / 53.15 / 36.13
  wkd_f                     37.21 / 57.32 / 40.15   34.47 / 54.67 / 36.85
  dkd+reviewkd              37.01 / 57.53 / 39.85   34.35 / 54.89 / 36.61
  wkd_lf                    37.49 / 57.76 / 40.39   34.80 / 55.27 / 37.28
  fcfd                      37.37 / 57.60 / 40.34   34.97 / 55.04 / 37.51
  wkd_lf_box                37.79 / 57.95 / 41.08   35.48 / 55.21 / 38.45
(ReviewKD's 34.00 is printed in several papers and is probably a misprint. ICD's decoder was trained by AdamW with
clipped gradients; here SGD trains everything, see docs/methods.md.) No number here was measured with this package. The
paper's detection code was never published: of WKD's rows this file has the settings that its text gives, and
docs/methods.md says what was chosen where it gives none.
[P] the papers.

Schedule, as in the code of ReviewKD, DKD and FCFD: 180,000 steps of 8 images, SGD 0.9, rate 0.01 after 1,000 steps of
warm-up, a tenth after 120,000 and 160,000 steps, weight decay 1e-4 on biases too and not on BatchNorms. Short side one
of 640 to 800 pixels, flips. That code's BatchNorms of connectors see the images of one GPU; here they see all 8.

norm_quirk=reference, two slips of that code: for r101_r18 the student's images are RGB, and mean and std are listed as
BGR; the teacher's are centred before their channels are swapped, so that it sees red and blue shifted by 20 levels. For
r50_mv2 the student's images are only centred, std 1, whatever its weights were made with. r101_r50 has none. Say which
one you ran.
"""

from ml_collections import ConfigDict

from configs import common

# Mean and std in RGB order, of the full range 1. Caffe's weights, which detectron2's were made from, divide by nothing.
CAFFE = dict(mean=(123.675 / 255, 116.28 / 255, 103.53 / 255), std=(1 / 255,) * 3)
IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
SWAPPED = dict(mean=CAFFE["mean"][::-1], std=(57.375 / 255, 57.12 / 255, 58.395 / 255))

PAIRS = {
    "r101_r18": dict(
        teacher="faster_rcnn_r101.d2_3x_coco",
        student=dict(name="faster_rcnn_r18"),
        init="resnet18.tv_in1k",
        feeding={"fixed": (IMAGENET, CAFFE), "reference": (SWAPPED, dict(CAFFE, mean=SWAPPED["mean"]))},
    ),
    "r50_mv2": dict(
        teacher="faster_rcnn_r50.d2_3x_coco",
        student=dict(name="faster_rcnn_mobilenetv2", freeze_at=0),
        init="mobilenet_v2.tv_in1k",
        feeding={"fixed": (IMAGENET, CAFFE), "reference": (CAFFE, CAFFE)},
    ),
    "r101_r50": dict(
        teacher="faster_rcnn_r101.d2_3x_coco",
        student=dict(name="faster_rcnn_r50"),
        init="resnet50.msra_in1k",
        feeding={"fixed": (CAFFE, CAFFE), "reference": (CAFFE, CAFFE)},
    ),
}
TEACHERS = {pair: "faster_rcnn_r50" if pair == "r50_mv2" else "faster_rcnn_r101" for pair in PAIRS}
LEVELS = ("p2", "p3", "p4", "p5", "p6")
NORMALISED = {"reviewkd", "wkd_f", "fcfd_detection", "icd"}  # their connectors have normalisation to be trained
NORMALISATION = r"/(bn|norm)\d*/(scale|bias)$"
DELAYS = {"fgfi": 400, "icd": 1000}  # steps before the student is distilled
ROI = 18  # side of the pooled regions that WKD-F compares, positions


def rows(pair: str) -> dict[str, dict]:
    """Row of the table -> its methods."""
    sharpness = {"r101_r18": 2.0, "r50_mv2": 1.0, "r101_r50": 2.0}[pair]
    review = {"r101_r18": 1.2, "r50_mv2": 2.0, "r101_r50": 1.0}[pair]
    constant = dict(name="constant")
    dkd = dict(dkd=dict(alpha=1.0, beta=0.25, temperature=1.0, schedule=constant))
    reviewkd = dict(
        reviewkd=dict(
            weight=review,
            student_taps=LEVELS,
            teacher_taps=LEVELS,
            pooled_level=False,
            preactivation="none",
            schedule=constant,
        )
    )
    wkd_l = common.wkd("code", dict(wkd_l=dict(weight=1.0, temperature=1.0, sharpness=sharpness)), start=None)
    wkd_f = common.wkd(
        "code",
        dict(
            wkd_f=dict(
                weight=5e-3, mean_cov_ratio=2.0, student_tap="roi", teacher_tap="roi", projector="conv3x3", grid=4
            )
        ),
        start=None,
    )
    return {
        "none": {},
        "kd": dict(kd=dict(weight=1.0, temperature=1.0, schedule=constant)),
        "dkd": dkd,
        "fitnet": dict(
            fitnet=dict(weight=1.0, student_taps=LEVELS, teacher_taps=LEVELS, projector="linear", schedule=constant)
        ),
        "fgfi": dict(fgfi=dict(schedule=constant)),
        "icd": dict(icd=dict(schedule=constant)),
        "reviewkd": reviewkd,
        "dkd+reviewkd": dkd | reviewkd,
        "fcfd": dict(fcfd_detection=dict(schedule=constant)),
        "wkd_l": wkd_l,
        "wkd_f": wkd_f,
        "wkd_lf": wkd_l | wkd_f,
        "wkd_lf_box": wkd_l | wkd_f | dict(box_regression={}),
    }


def get_config(argument: str = "") -> ConfigDict:
    """The config; see the file's head for the arguments."""
    args = common.parse(
        argument,
        pair="r101_r18",
        method="wkd_lf",
        source="folder",
        data_dir="",
        test_json="",
        norm_quirk="fixed",
        batch=8,
        seed=0,
    )
    if args.batch < 1:
        raise ValueError(f"config argument batch={args.batch}: must be 1 or more")
    pair = common.choose("pair", args.pair, PAIRS)
    share = args.batch / 8  # of the published batch

    def length(steps: int) -> int:
        return round(steps / share)

    methods = common.choose("method", args.method, rows(args.pair))
    for name, steps in DELAYS.items():
        if name in methods:
            methods[name]["delay"] = length(steps)
    student, teacher = common.choose("norm_quirk", args.norm_quirk, pair["feeding"])
    tap = dict(roi_tap=ROI) if "wkd_f" in methods else {}
    config = ConfigDict(
        dict(
            name=common.file_name("coco", args.pair, args.method, "" if args.norm_quirk == "fixed" else "quirk"),
            seed=args.seed,
            steps=length(180_000),
            global_batch_size=args.batch,
            optimizer=dict(
                name="sgd",
                learning_rate=0.01 * share,
                momentum=0.9,
                nesterov=False,
                weight_decay=1e-4,
                decay_rules=((NORMALISATION, 0.0),) if NORMALISED & {*methods} else (),
                schedule="step",
                unit="steps",
                milestones=(length(120_000), length(160_000)),
                factor=0.1,
                warmup=float(length(1000)),
                warmup_learning_rate=1e-5 * share,
            ),
            task=dict(name="detection"),
            log_every=50,
            eval_every=4,
            checkpoint_every=2000,
        )
    )
    config.data = ConfigDict(dict(_data(args), **student))
    config.student = ConfigDict(dict(pair["student"], **tap))
    config.init = ConfigDict(dict(weights=pair["init"]))
    if methods:
        config.teacher = ConfigDict(
            dict(weights=pair["teacher"], model=dict(name=TEACHERS[args.pair], **tap), normalisation=teacher)
        )
    config.interrelation = ConfigDict(common.interrelation("pooled"))
    config.methods = ConfigDict(methods)
    return config


def _data(args) -> dict:
    """The `data` section, less how the student is fed."""
    if args.source == "tfds":
        if not args.test_json:
            raise ValueError("config argument source=tfds: needs test_json=FILE, COCO's own instances_val2017.json")
        return dict(name="coco_tfds", test_json=args.test_json, **common.directory(args.data_dir))
    common.choose("source", args.source, {"folder": None, "tfds": None})
    return dict(name="coco", data_dir=args.data_dir or "coco")
