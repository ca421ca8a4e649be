"""tokenlabels show --layout: the most probable entity of every position, as a model with MoTo finds them."""

from typing import TYPE_CHECKING

from tokenlabels.cli.show_inputs import ImageChoice, ModelChoice, pixels_of

if TYPE_CHECKING:
    from PIL.Image import Image


def draw_layout(model: ModelChoice, images: ImageChoice, num_entities: int) -> "Image":
    """One row per image: the image and the layout of every MoTo."""
    from tokenlabels.analysis import entity_maps
    from tokenlabels.trainer.ranks import join_ranks
    from tokenlabels.views.layout import ImageLayouts, draw_layouts, entity_colours

    entity_colours(num_entities)  # refuses more than there are
    network = model.load().to(join_ranks(model.device))
    samples = images.find()
    pixels, normalised = pixels_of(network, samples, model.image_size)
    maps = {name: entities.cpu().numpy() for name, entities in entity_maps(network, normalised(pixels)).items()}
    shown = pixels.byte().permute(0, 2, 3, 1).numpy()
    layouts = [
        ImageLayouts(image, tuple(of_all[index] for of_all in maps.values()), sample.key)
        for index, (image, sample) in enumerate(zip(shown, samples, strict=True))
    ]
    titles = [f"{name}, {entities.shape[1]} x {entities.shape[2]}" for name, entities in maps.items()]
    height, width, _ = layouts[0].image.shape
    return draw_layouts(layouts, titles, num_entities, f"{model}, {height} x {width} px, {num_entities} entities")
