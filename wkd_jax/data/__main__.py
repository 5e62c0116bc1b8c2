"""Command line: prepares data sets for training, once, and says what is wrong with them.

    python -m wkd_jax.data prepare imagenet2012 --data_dir DIR [--manual_dir D]
    python -m wkd_jax.data prepare fashion_mnist --from DIRECTORY-OF-IDX-FILES [--data_dir DIR]
    python -m wkd_jax.data prepare folder --data_dir DIR [--from ILSVRC2012_img_train.tar ILSVRC2012_img_val.tar]
    python -m wkd_jax.data check NAME-or-DIR [--decode]

`prepare --help` and `check --help` have the arguments. Exit codes: 0 done; 1 an error, or something is wrong with the
data; 2 the command line is wrong. Environment: TFDS_DATA_DIR, where sets of TensorFlow Datasets are
(~/tensorflow_datasets); WKD_JAX_CACHE, for what cannot be written beside the data (~/.cache/wkd_jax).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

from wkd_jax.command import Parser
from wkd_jax.data.prepare import prepare
from wkd_jax.data.unpack import unpack

_PREPARE = """Makes a data set readable for training, doing what is not done yet.

A set of TensorFlow Datasets is built (which alone needs TensorFlow: pip install 'wkd-jax[prepare]'), converted if its
files are TFRecord, or written from idx files, which MNIST's kind of set comes as; it gets an index of its labels.
`folder` unpacks ImageNet's archives into class folders, and sorts a val folder that has none.

    %(prog)s cifar100
    %(prog)s fashion_mnist --from /usr/share/datasets/fashion-mnist
    %(prog)s imagenet2012 --data_dir /data/tfds --manual_dir /data/archives
    %(prog)s folder --data_dir /data/imagenet --from ILSVRC2012_img_train.tar ILSVRC2012_img_val.tar

Exit codes: 0 the set is ready; 1 an error, which says what to do; the same command does what is left."""

_CHECK = """Says what a data set holds and what is wrong with it.

    %(prog)s imagenet2012 --data_dir /data/tfds
    %(prog)s /data/imagenet --decode

Exit codes: 0 all is well; 1 anything is wrong."""


def main(argv: Sequence[str] | None = None, prog: str = "python -m wkd_jax.data") -> int:
    """Entry point; returns the exit code."""
    args = _parser(prog).parse_args(argv)
    try:
        for line in args.run(args):
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()  # the next may take an hour
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def _parser(prog: str) -> Parser:
    parser = Parser(prog=prog, description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    making = commands.add_parser(
        "prepare",
        help="make a data set readable for training",
        description=_PREPARE,
    )
    making.add_argument("dataset", help="as TensorFlow Datasets writes it, name[/config][:version]; or: folder")
    making.add_argument("--data_dir", help="where prepared sets are; default: $TFDS_DATA_DIR or ~/tensorflow_datasets")
    making.add_argument("--manual_dir", help="archives fetched by hand; default: downloads/manual in --data_dir")
    making.add_argument("--label_key", default="label", help="feature that holds the class label; default: label")
    making.add_argument(
        "--from",
        dest="sources",
        nargs="+",
        default=[],
        metavar="PATH",
        help="with folder: archives to unpack; with mnist, fashion_mnist, kmnist: the idx files, or the folder of them",
    )
    making.set_defaults(run=_prepare)

    looking = commands.add_parser(
        "check",
        help="say what a data set holds and what is wrong with it",
        description=_CHECK,
    )
    looking.add_argument("source", metavar="NAME-or-DIR", help="a set of TensorFlow Datasets, or a folder")
    looking.add_argument(
        "--data_dir", help="where the set of that name was prepared; default: $TFDS_DATA_DIR or ~/tensorflow_datasets"
    )
    looking.add_argument("--train_split", default="train", help="folder of the training images; default: train")
    looking.add_argument("--test_split", default="val", help="folder of the test images; default: val")
    looking.add_argument("--image_key", default="image", help="feature that holds the image; default: image")
    looking.add_argument("--label_key", default="label", help="feature that holds the class label; default: label")
    looking.add_argument("--decode", action="store_true", help="decode every image, and name those that cannot be")
    looking.set_defaults(run=_check)
    return parser


def _prepare(args: argparse.Namespace) -> Iterator[str]:
    if args.dataset != "folder":
        return prepare(
            args.dataset,
            data_dir=args.data_dir,
            manual_dir=args.manual_dir,
            sources=args.sources,
            label_key=args.label_key,
        )
    if not args.data_dir:
        raise ValueError("prepare folder: give --data_dir, the folder that has, or gets, train and val")
    if args.manual_dir:
        raise ValueError("--manual_dir has a meaning with TFDS sets alone; give archives with --from")
    return unpack(args.data_dir, args.sources)


def _check(args: argparse.Namespace) -> Iterator[str]:
    from wkd_jax.data.check import check  # needs what training needs; preparing, perhaps elsewhere, does not

    return check(
        args.source,
        data_dir=args.data_dir,
        train_split=args.train_split,
        test_split=args.test_split,
        image_key=args.image_key,
        label_key=args.label_key,
        decode=args.decode,
    )


if __name__ == "__main__":
    sys.exit(main())
