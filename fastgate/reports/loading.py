"""How the network of a run is loaded and used, as code to copy."""

from typing import Any

from fastgate.reports.runs import RunRecord
from fastgate.training.data.interface import RESIZED
from fastgate.training.records import Preprocessing
from fastgate.training.run_folder import NETWORK

_CODE = """import fastgate as fg
import torch
from torchvision.transforms import v2

model = fg.load({network!r})  # a plain network, in eval mode on the CPU
preprocess = v2.Compose([
{sized}
    v2.ToDtype(torch.float32, scale=True),  # 0 to 1
    v2.Normalize(mean={mean}, std={std}),
])
with torch.inference_mode():
    scores = model(preprocess(image)[None])  # image: a PIL image, {mode}; scores: [1, classes]
{answer}"""


def explain_loading(run: RunRecord) -> dict[str, Any] | None:
    """The code, and what is missing in it because the run did not record it; None before the run is finished.

    Summaries of earlier versions have the size of the images alone, no `preprocessing`.
    """
    if run.summary is None or "image_size" not in run.summary:
        return None
    channels, height, width = run.summary["image_size"]
    known = run.summary.get("preprocessing", Preprocessing())
    if known.get("dataset", "").startswith("folder:"):  # as the images of folders are read
        sized = [f"v2.Resize({round(height * RESIZED)})", f"v2.CenterCrop({height})", "v2.ToImage()"]
    else:
        sized = ["v2.ToImage()", f"v2.Resize(({height}, {width}))"]
    if channels == 1:
        sized.append("v2.Grayscale()")
    names = known.get("class_names")
    missing = [] if known.get("mean") else ["mean and std of the training images"]
    code = _CODE.format(
        network=str(run.folder / NETWORK),
        sized="\n".join(f"    {line}," for line in sized),
        mode="upright" if channels == 1 else "upright, RGB",
        mean=_numbers(known.get("mean")),
        std=_numbers(known.get("std")),
        answer="print(class_names[scores.argmax()])" if names else "print(scores.argmax().item())  # the label",
    )
    if names:
        code = code.replace("\nwith torch", f"\nclass_names = {list(names)!r}\nwith torch")
    return {"code": code, "missing": missing}


def _numbers(values: list[float] | None) -> str:
    return "[...]" if not values else f"[{', '.join(f'{value:.6g}' for value in values)}]"
