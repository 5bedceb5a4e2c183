"""`make images`: builds the images and loads them into the cluster, where there is one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.cluster.containers.kind import docker_answers
from tools.cluster.containers.layout import KIND, SOURCE, BadState, layout
from tools.images.building import BuildahImages, DockerImages, Images, build, remove
from tools.images.loaded import note
from tools.images.recipes import ACCELERATORS, RECIPES, TAG
from tools.saying import say
from tools.servers.process import ServerError


def main(argv: Sequence[str] | None = None) -> int:
    """Build and load; 0 where it is done, 1 where it can't be."""
    arguments = _parsed(argv)
    try:
        if arguments.remove:
            remove()
            return 0
        for name in arguments.names:
            if name not in RECIPES:
                raise ServerError(f"NAME: got {name}; allowed: {', '.join(RECIPES)}")
        cluster = layout(arguments.state)
        images = _images(arguments.build_for or cluster.way)
        if arguments.file is not None:
            built = [_own(images, arguments)]
        else:
            built = [
                build(
                    images,
                    RECIPES[name],
                    base=arguments.base,
                    accelerator=arguments.accelerator,
                    tag=arguments.tag,
                )
                for name in arguments.names or RECIPES
            ]
        if arguments.build_for:
            return 0
        if cluster.way is None:
            say("no cluster to load them into: make cluster, then make images")
            return 0
        for image in built:
            images.load(image, cluster)
            note(cluster, image, images.identity(image))
    except (ServerError, BadState) as error:
        say(f"error: {error}")
        return 1
    return 0


def _own(images: Images, arguments: argparse.Namespace) -> str:
    """Build an image of the user's own."""
    file: Path = arguments.file.resolve()
    images.build(file.name, arguments.image, file.parent, {})
    return str(arguments.image)


def _images(way: str | None) -> Images:
    """What makes images that a cluster of that way can have; None for any."""
    if way == KIND or (way is None and docker_answers()):
        return DockerImages(say)
    buildah = BuildahImages(say)
    buildah.prepare()
    return buildah


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.images", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(RECIPES)} (default: all)"
    )
    parser.add_argument("--state", type=Path, help="the cluster's (default: ESPER_CLUSTER_STATE)")
    parser.add_argument("--base", help="an image to build on (default: of Debian's packages)")
    parser.add_argument("--accelerator", choices=ACCELERATORS, default="cpu")
    parser.add_argument("--tag", default=TAG)
    parser.add_argument(
        "--build-for", choices=(KIND, SOURCE), help="a cluster to come; none is loaded into"
    )
    own = parser.add_argument_group("an image of your own, built beside its Containerfile")
    own.add_argument("--file", type=Path, help="its Containerfile")
    own.add_argument("--image", default="localhost/my-model:dev", help="its name")
    parser.add_argument("--remove", action="store_true", help="remove all that buildah has made")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
