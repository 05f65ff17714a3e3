"""The everyday concepts that the tiny LLaVA learns to name, and the drawings that stand for them.

A drawing is known by its slug, the hyphenated Unicode name that most emoji packages share. Several slugs under one
concept ("dog dog-face") give the model more pictures of the same thing. Nothing here depends on an artist except
`FXEMOJI_SLUGS`, because that package has names of its own, and `ICON_MEANS_OTHER`: sets of icons are looked up by the
concept's own name, which stands for something else there now and then.
"""

# fmt: off
CONCEPTS: dict[str, dict[str, str]] = {
    "animal": {
        "dog": "dog dog-face", "cat": "cat cat-face", "lion": "lion lion-face", "tiger": "tiger tiger-face",
        "horse": "horse horse-face", "cow": "cow cow-face ox", "pig": "pig pig-face", "sheep": "ewe",
        "monkey": "monkey monkey-face", "elephant": "elephant", "mouse": "mouse mouse-face",
        "rabbit": "rabbit rabbit-face", "bear": "bear", "panda": "panda", "koala": "koala", "fox": "fox",
        "frog": "frog", "turtle": "turtle", "snake": "snake", "crocodile": "crocodile", "chicken": "chicken rooster",
        "bird": "bird", "penguin": "penguin", "duck": "duck",
        "owl": "owl", "whale": "whale spouting-whale", "dolphin": "dolphin", "fish": "fish tropical-fish",
        "shark": "shark", "octopus": "octopus", "crab": "crab", "snail": "snail", "butterfly": "butterfly",
        "bee": "honeybee", "ladybug": "lady-beetle", "spider": "spider", "zebra": "zebra",
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
        "pizza": "pizza", "hot dog": "hot-dog", "french fries": "french-fries",
        "popcorn": "popcorn", "ice cream": "ice-cream soft-ice-cream", "doughnut": "doughnut",
        "cookie": "cookie", "cake": "birthday-cake shortcake",
    },
    "drink": {
        "coffee": "hot-beverage", "beer": "beer-mug", "wine": "wine-glass",
    },
    "plant": {
        "tree": "deciduous-tree evergreen-tree", "palm tree": "palm-tree", "cactus": "cactus", "rose": "rose",
        "sunflower": "sunflower", "tulip": "tulip", "christmas tree": "christmas-tree",
        "leaf": "maple-leaf fallen-leaf",
    },
    "vehicle": {
        "car": "automobile oncoming-automobile", "bus": "bus oncoming-bus",
        "train": "train locomotive high-speed-train", "truck": "delivery-truck articulated-lorry",
        "fire truck": "fire-engine", "ambulance": "ambulance",
        "tractor": "tractor", "bicycle": "bicycle", "motorcycle": "motorcycle motor-scooter", "airplane": "airplane",
        "helicopter": "helicopter", "rocket": "rocket", "sailboat": "sailboat", "ship": "ship passenger-ship",
    },
    "building": {
        "house": "house house-with-garden", "church": "church", "castle": "castle",
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
        "person": "person man woman boy girl",
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

# Drawings the model is taught to be unsure of: real things and signs, but far from every concept above.
UNSURE_SLUGS: str = (
    "abacus alembic amphora anger-symbol artist-palette atom-symbol axe ballot-box-with-ballot barber-pole "
    "bar-chart battery biohazard black-nib bookmark boomerang bow-and-arrow boxing-glove briefcase brick bubbles "
    "bucket bullseye card-index-dividers carp-streamer carpentry-saw chains chart-increasing check-mark clamp "
    "clapper-board classical-building clipboard clockwise-vertical-arrows coffin coin comet compass construction "
    "control-knobs copyright coral credit-card cross-mark crystal-ball curling-stone curly-loop dagger dango desert "
    "diamond-suit diving-mask diya-lamp dna droplet electric-plug exclamation-question-mark factory fax-machine "
    "feather file-folder film-frames firecracker fireworks flag-in-hole flashlight floppy-disk flute "
    "folding-hand-fan fishing-pole fleur-de-lis framed-picture funeral-urn gear gem-stone ginger-root "
    "globe-showing-americas goal-net hamsa headphone headstone hook hourglass-done infinity input-numbers joystick "
    "keycap-5 kite knot label ladder landslide latin-cross left-arrow level-slider link lipstick low-battery "
    "magic-wand magnet maracas medical-symbol memo microbe microscope military-medal mirror mirror-ball moai "
    "money-bag mosque mount-fuji mouse-trap nazar-amulet nesting-dolls newspaper no-entry nut-and-bolt oden "
    "oil-drum ok-button oyster package pager paintbrush paperclip peace-symbol performing-arts petri-dish pill "
    "pinata play-button plunger postal-horn postbox prayer-beads prohibited puzzle-piece pushpin radio radioactive "
    "railway-track razor recycling-symbol red-envelope registered right-arrow ring-buoy rock roller-coaster "
    "roller-skate safety-pin satellite satellite-antenna scroll sewing-needle shield shopping-cart skateboard skis "
    "sled slot-machine soap sos-button speaker-high-volume spider-web spiral-shell splatter sponge stethoscope "
    "stop-sign straight-ruler syringe telescope test-tube thread thermometer ticket tokyo-tower toothbrush tornado "
    "trackball treasure-chest triangular-ruler trident-emblem trombone up-arrow vibration-mode video-game volcano "
    "warning wastebasket water-wave wheel wheel-of-dharma wheelchair-symbol wind-chime window wireless wood "
    "world-map x-ray yin-yang yo-yo zzz"
)
UNSURE_HELDOUT_SLUGS: str = (
    "aerial-tramway balance-scale broken-chain broom bowling calendar chess-pawn club-suit dvd ferris-wheel "
    "fondue fountain fuel-pump game-die harp loudspeaker mahjong-red-dragon milky-way mountain multiply ping-pong "
    "placard receipt ringed-planet roll-of-paper screwdriver spade-suit sparkler tanabata-tree toolbox white-cane "
    "yarn"
)

# fmt: off
FXEMOJI_SLUGS: dict[str, str] = {
    "dog": "dogside", "dog-face": "dog", "cat": "catside", "cat-face": "cat", "tiger": "tigerside",
    "tiger-face": "tiger", "pig": "pigside", "pig-face": "pig", "mouse": "mouseside", "mouse-face": "mouse",
    "ewe": "sheep", "panda": "pandaface", "camel": "dromedarycamel", "two-hump-camel": "bactriancamel",
    "fox": "foxsmiling",
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

ICON_MEANS_OTHER: dict[str, set[str]] = {
    "mdi": {"mouse", "apple"}, "ph": {"mouse"}, "fa7-solid": {"mouse"}, "game-icons": {"tiger", "football"},
    "icon-park": {"mouse", "apple", "chicken", "heart", "anchor", "trumpet", "football", "hat"},
}

PLURAL_NAMES = {"grapes", "cherries", "french fries", "pants", "shorts", "shoes", "glasses", "socks", "scissors"}
MASS_NAMES = {"corn", "broccoli", "bread", "cheese", "popcorn", "ice cream", "coffee", "beer", "wine",
              "fire"}
# fmt: on
