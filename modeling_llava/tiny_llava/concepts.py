"""The everyday concepts that the tiny LLaVA learns to name, and the drawings that stand for them.

A drawing is known by its slug, the hyphenated Unicode name that most emoji packages share. Several slugs under one
concept ("dog dog-face") give the model more pictures of the same thing. Nothing here depends on an artist except
`FXEMOJI_SLUGS`, because that package has names of its own.
"""

# fmt: off
CONCEPTS: dict[str, dict[str, str]] = {
    "animal": {
        "dog": "dog dog-face", "cat": "cat cat-face", "lion": "lion lion-face", "tiger": "tiger tiger-face",
        "horse": "horse horse-face", "cow": "cow cow-face ox", "pig": "pig pig-face", "sheep": "ewe",
        "monkey": "monkey monkey-face", "elephant": "elephant", "mouse": "mouse mouse-face",
        "rabbit": "rabbit rabbit-face", "bear": "bear", "panda": "panda", "koala": "koala", "fox": "fox",
        "frog": "frog", "turtle": "turtle", "snake": "snake", "crocodile": "crocodile", "chicken": "chicken rooster",
        "chick": "baby-chick front-facing-baby-chick", "bird": "bird", "penguin": "penguin", "duck": "duck",
        "owl": "owl", "whale": "whale spouting-whale", "dolphin": "dolphin", "fish": "fish tropical-fish",
        "shark": "shark", "octopus": "octopus", "crab": "crab", "snail": "snail", "butterfly": "butterfly",
        "bee": "honeybee", "ladybug": "lady-beetle", "spider": "spider", "ant": "ant", "zebra": "zebra",
        "giraffe": "giraffe", "camel": "camel two-hump-camel",
    },
    "fruit": {
        "apple": "red-apple green-apple", "banana": "banana", "orange": "tangerine", "lemon": "lemon",
        "pear": "pear", "peach": "peach", "strawberry": "strawberry", "grapes": "grapes", "cherries": "cherries",
        "watermelon": "watermelon", "pineapple": "pineapple", "avocado": "avocado",
    },
    "vegetable": {
        "tomato": "tomato", "carrot": "carrot", "corn": "ear-of-corn", "eggplant": "eggplant", "broccoli": "broccoli",
        "mushroom": "mushroom", "hot pepper": "hot-pepper",
    },
    "food": {
        "bread": "bread", "cheese": "cheese-wedge", "egg": "egg cooking", "hamburger": "hamburger",
        "pizza": "pizza", "hot dog": "hot-dog", "french fries": "french-fries", "sandwich": "sandwich",
        "sushi": "sushi", "popcorn": "popcorn", "ice cream": "ice-cream soft-ice-cream", "doughnut": "doughnut",
        "cookie": "cookie", "cake": "birthday-cake shortcake", "lollipop": "lollipop",
    },
    "drink": {
        "coffee": "hot-beverage", "beer": "beer-mug", "wine": "wine-glass", "milk": "glass-of-milk",
    },
    "plant": {
        "tree": "deciduous-tree evergreen-tree", "palm tree": "palm-tree", "cactus": "cactus", "rose": "rose",
        "sunflower": "sunflower", "tulip": "tulip", "christmas tree": "christmas-tree",
        "leaf": "maple-leaf fallen-leaf",
    },
    "vehicle": {
        "car": "automobile oncoming-automobile", "taxi": "taxi oncoming-taxi", "bus": "bus oncoming-bus",
        "train": "train locomotive high-speed-train", "truck": "delivery-truck articulated-lorry",
        "fire truck": "fire-engine", "ambulance": "ambulance", "police car": "police-car oncoming-police-car",
        "tractor": "tractor", "bicycle": "bicycle", "motorcycle": "motorcycle motor-scooter", "airplane": "airplane",
        "helicopter": "helicopter", "rocket": "rocket", "sailboat": "sailboat", "ship": "ship passenger-ship",
    },
    "building": {
        "house": "house house-with-garden", "church": "church", "castle": "castle", "hospital": "hospital",
        "tent": "tent",
    },
    "piece of clothing": {
        "dress": "dress", "t-shirt": "t-shirt", "pants": "jeans", "shorts": "shorts", "hat": "top-hat womans-hat",
        "shoes": "mans-shoe running-shoe", "boot": "womans-boot", "crown": "crown",
        "glasses": "glasses sunglasses", "necktie": "necktie", "socks": "socks",
    },
    "musical instrument": {
        "guitar": "guitar", "violin": "violin", "trumpet": "trumpet", "drum": "drum", "saxophone": "saxophone",
        "piano": "musical-keyboard",
    },
    "tool": {
        "hammer": "hammer", "wrench": "wrench", "scissors": "scissors",
    },
    "ball": {
        "soccer ball": "soccer-ball", "basketball": "basketball", "baseball": "baseball", "tennis ball": "tennis",
        "football": "american-football",
    },
    "device": {
        "phone": "mobile-phone telephone", "computer": "laptop desktop-computer",
        "television": "television", "camera": "camera camera-with-flash", "watch": "watch",
        "alarm clock": "alarm-clock", "light bulb": "light-bulb", "microphone": "microphone studio-microphone",
    },
    "thing in the sky": {
        "sun": "sun sun-with-face", "moon": "crescent-moon first-quarter-moon-face last-quarter-moon-face",
        "star": "star glowing-star", "cloud": "cloud", "rainbow": "rainbow", "snowflake": "snowflake",
    },
    "thing": {
        "umbrella": "umbrella umbrella-with-rain-drops", "balloon": "balloon", "gift": "wrapped-gift",
        "trophy": "trophy", "teddy bear": "teddy-bear", "snowman": "snowman snowman-without-snow", "fire": "fire",
        "key": "key old-key", "lock": "locked unlocked", "book": "closed-book open-book green-book blue-book",
        "pencil": "pencil", "envelope": "envelope", "bell": "bell", "chair": "chair", "bed": "bed", "door": "door",
        "toilet": "toilet", "bathtub": "bathtub", "heart": "red-heart", "anchor": "anchor", "backpack": "backpack",
        "handbag": "handbag purse", "bomb": "bomb", "candle": "candle", "ghost": "ghost", "skull": "skull",
        "robot": "robot",
    },
    "person": {
        "person": "man woman boy girl old-man old-woman person child baby",
        "smiley": "grinning-face smiling-face-with-smiling-eyes slightly-smiling-face grinning-face-with-big-eyes",
    },
}

CLOTHING_CLASSES: dict[str, str] = {
    "dress": "dress", "hat": "hat", "longsleeve": "long-sleeve shirt", "outwear": "jacket", "pants": "pants",
    "shirt": "shirt", "shoes": "shoes", "shorts": "shorts", "skirt": "skirt", "t-shirt": "t-shirt",
}
# fmt: on

# Never drawn for training: they measure whether a category is understood beyond the names that were learned.
NEW_CONCEPTS: dict[str, str] = {
    "animal": "wolf deer goat gorilla hippopotamus rhinoceros hedgehog squid shrimp parrot eagle swan kangaroo llama",
    "food": "taco pancakes croissant pretzel bacon cupcake spaghetti waffle",
    "fruit": "mango kiwi-fruit coconut melon",
    "vehicle": "minibus tram racing-car pickup-truck speedboat canoe",
    "plant": "hibiscus cherry-blossom potted-plant",
    "musical instrument": "banjo accordion",
}

# Drawings the model is taught to be unsure of: real things, but far from every concept above.
UNSURE_SLUGS: str = (
    "abacus alembic amphora anger-symbol atom-symbol ballot-box-with-ballot barber-pole biohazard black-nib "
    "boomerang bubbles card-index-dividers carp-streamer chains clamp coffin compass control-knobs coral "
    "crystal-ball curling-stone dango diya-lamp dna fax-machine feather film-frames firecracker "
    "flag-in-hole folding-hand-fan fishing-pole funeral-urn gear ginger-root goal-net hamsa headstone hook "
    "hourglass-done infinity joystick kite knot label ladder level-slider link low-battery magic-wand "
    "magnet maracas microbe microscope military-medal mirror-ball moai mouse-trap nazar-amulet "
    "nesting-dolls nut-and-bolt oden oil-drum oyster pager paperclip peace-symbol petri-dish pinata "
    "plunger postal-horn prayer-beads puzzle-piece pushpin radioactive razor recycling-symbol red-envelope "
    "ring-buoy roller-coaster safety-pin satellite satellite-antenna scroll sewing-needle shield slot-machine "
    "sponge spider-web spiral-shell stethoscope syringe telescope test-tube thread thermometer tornado trackball "
    "trident-emblem triangular-ruler volcano water-wave wheel-of-dharma wind-chime x-ray yin-yang yo-yo"
)
UNSURE_HELDOUT_SLUGS: str = (
    "aerial-tramway balance-scale broken-chain fondue fuel-pump game-die loudspeaker mahjong-red-dragon "
    "milky-way receipt spade-suit placard tanabata-tree white-cane yarn roll-of-paper sparkler dvd"
)

# fmt: off
FXEMOJI_SLUGS: dict[str, str] = {
    "dog": "dogside", "dog-face": "dog", "cat": "catside", "cat-face": "cat", "tiger": "tigerside",
    "tiger-face": "tiger", "pig": "pigside", "pig-face": "pig", "mouse": "mouseside", "mouse-face": "mouse",
    "ewe": "sheep", "panda": "pandaface", "camel": "dromedarycamel", "two-hump-camel": "bactriancamel",
    "front-facing-baby-chick": "frontfacingchick", "baby-chick": "babychick", "fox": "foxsmiling",
    "spouting-whale": "spurtingwhale", "rabbit-face": "bunny", "lady-beetle": "ladybeetle",
    "eggplant": "aubergine", "ear-of-corn": "earofmaize", "hot-pepper": "chilipepper",
    "pizza": "sliceofpizza", "evergreen-tree": "evergreen", "maple-leaf": "mapleleaf", "fallen-leaf": "fallingleaf",
    "locomotive": "steamlocomotive", "high-speed-train": "highspeedtrain", "house": "housebuilding",
    "castle": "europeancastle", "t-shirt": "mansshirt", "womans-hat": "womanshat", "womans-boot": "boot",
    "sunglasses": "darksunglasses", "necktie": "tie", "soccer-ball": "soccerball", "basketball": "basketballandhoop",
    "tennis": "tennisball", "mobile-phone": "cellphone", "laptop": "personalcomputer",
    "desktop-computer": "desktopcomputer", "telephone": "blacktelephone", "studio-microphone": "studiomic",
    "sun": "whitesun", "star": "whitemediumstar", "wrapped-gift": "present", "locked": "lock", "unlocked": "openlock",
    "backpack": "schoolsatchel", "red-heart": "redheart", "scissors": "blackscissors",
    "first-quarter-moon-face": "firstquartermoonface", "last-quarter-moon-face": "lastquartermoonface",
    "grinning-face": "grin", "smiling-face-with-smiling-eyes": "smileeyes", "slightly-smiling-face": "smallsmile",
    "grinning-face-with-big-eyes": "grinwide", "snowman-without-snow": "snowmanwithoutsnow",
}

PLURAL_NAMES = {"grapes", "cherries", "french fries", "pants", "shorts", "shoes", "glasses", "socks", "scissors"}
MASS_NAMES = {"corn", "broccoli", "bread", "cheese", "sushi", "popcorn", "ice cream", "coffee", "beer", "wine",
              "milk", "fire"}
# fmt: on
