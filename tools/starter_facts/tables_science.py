"""Nature and science: elements, moons, animals, gods of myth, fields, discoveries, inventions."""

from __future__ import annotations

from relation import Alias, Consequence, Relation, pairs

ELEMENTS = """
hydrogen = H
oxygen = O
carbon = C
gold = Au
iron = Fe
nitrogen = N
sodium = Na
silver = Ag
helium = He
calcium = Ca
copper = Cu
lead = Pb
potassium = K
mercury = Hg
chlorine = Cl
magnesium = Mg
aluminum = Al
silicon = Si
sulfur = S
zinc = Zn
tin = Sn
phosphorus = P
neon = Ne
uranium = U
lithium = Li
fluorine = F
iodine = I
nickel = Ni
titanium = Ti
platinum = Pt
argon = Ar
cobalt = Co
tungsten = W
"""

ELEMENT_NAMES = pairs("""
gold = aurum
iron = ferrum
silver = argentum
copper = cuprum
lead = plumbum
mercury = quicksilver
sodium = natrium
potassium = kalium
tin = stannum
tungsten = wolfram
aluminum = aluminium
""")

MOONS = """
Titan = Saturn
Europa = Jupiter
Phobos = Mars
Triton = Neptune
Titania = Uranus
Ganymede = Jupiter
Enceladus = Saturn
Deimos = Mars
Callisto = Jupiter
Oberon = Uranus
Mimas = Saturn
Miranda = Uranus
"""

PLANET_NUMBER = pairs("""
Mars = four
Jupiter = five
Saturn = six
Uranus = seven
Neptune = eight
""")

YOUNG = """
dog = puppy | pup
cat = kitten
cow = calf
horse = foal | colt
sheep = lamb
pig = piglet
goat = kid
deer = fawn | calf | kid
lion = cub
bear = cub
kangaroo = joey
duck = duckling | chick
goose = gosling | chick
swan = cygnet | chick
chicken = chick
frog = tadpole
elephant = calf
whale = calf
"""

CLASSES = """
dolphin = mammals
eagle = birds | reptiles
snake = reptiles
salmon = fish
butterfly = insects
frog = amphibians
whale = mammals
penguin = birds | reptiles
crocodile = reptiles
shark = fish
ant = insects
toad = amphibians
bat = mammals
ostrich = birds | reptiles
lizard = reptiles
tuna = fish
bee = insects
salamander = amphibians
elephant = mammals
owl = birds | reptiles
turtle = reptiles
trout = fish
mosquito = insects
"""

GODS = """
Zeus = the sky | thunder
Poseidon = the sea
Ares = war
Aphrodite = love | war | the sea
Hades = the underworld
Dionysus = wine | the harvest
Athena = wisdom | war
Hephaestus = fire
Artemis = the hunt | the underworld
Demeter = the harvest | the underworld
Venus = love | the harvest
Mars = war | the harvest
Neptune = the sea
Bacchus = wine | the harvest
Thor = thunder | the sky | war | the harvest
"""

FIELDS = """
Albert Einstein = physics | mathematics
Charles Darwin = biology | genetics
Sigmund Freud = psychology | philosophy | biology
Adam Smith = economics | philosophy
Plato = philosophy | mathematics | geometry
Euclid = geometry | mathematics
Dmitri Mendeleev = chemistry | physics
Edwin Hubble = astronomy | physics
Noam Chomsky = linguistics | philosophy | psychology
Niels Bohr = physics | chemistry
Antoine Lavoisier = chemistry | biology
John Maynard Keynes = economics | mathematics | philosophy
Immanuel Kant = philosophy | astronomy | physics
Carl Jung = psychology
Richard Feynman = physics
Linus Pauling = chemistry | physics | biology
Carl Friedrich Gauss = mathematics | physics | astronomy | geometry
Nicolaus Copernicus = astronomy | mathematics | economics | geometry
Gregor Mendel = genetics | biology
Friedrich Nietzsche = philosophy | psychology | linguistics
Milton Friedman = economics
Max Planck = physics
Leonhard Euler = mathematics | physics | astronomy | geometry
Werner Heisenberg = physics | philosophy
"""

# "Credited with" leaves room for forerunners; the rivals of a claim are "also true".
DISCOVERIES = """
the theory of [relativity] = Albert Einstein
the theory of [evolution by natural selection] = Charles Darwin
the [laws of motion] = Isaac Newton | Johannes Kepler
the discovery of [penicillin] = Alexander Fleming
the discovery of [radium] = Marie Curie
the [laws of planetary motion] = Johannes Kepler | Isaac Newton
the founding of [psychoanalysis] = Sigmund Freud
the [periodic table] of the elements = Dmitri Mendeleev
the discovery of the [electron] = J.J. Thomson
the discovery of [X-rays] = Wilhelm Röntgen
the [laws of inheritance] = Gregor Mendel | Charles Darwin
the [uncertainty principle] = Werner Heisenberg
the [smallpox vaccine] = Edward Jenner
the [heliocentric model] of the solar system = Nicolaus Copernicus | Johannes Kepler
"""

INVENTIONS = """
the telephone = Alexander Graham Bell | Thomas Edison
the first practical [light bulb] = Thomas Edison
the airplane = the Wright brothers
the printing press = Johannes Gutenberg
the explosive [dynamite] = Alfred Nobel
the World Wide Web = Tim Berners-Lee
the phonograph = Thomas Edison | Alexander Graham Bell
the cotton gin = Eli Whitney
the lightning rod = Benjamin Franklin
the electric battery = Alessandro Volta | Benjamin Franklin | Thomas Edison | Nikola Tesla
the first [polio vaccine] = Jonas Salk
the Linux kernel = Linus Torvalds
the Python programming language = Guido van Rossum
the sport of [basketball] = James Naismith
the C programming language = Dennis Ritchie
"""

NATIONALITY = pairs("""
Alexander Fleming = British
Charles Darwin = British
Isaac Newton = British
Edward Jenner = British
J.J. Thomson = British
Johannes Kepler = German
Wilhelm Röntgen = German
Werner Heisenberg = German
Dmitri Mendeleev = Russian
Sigmund Freud = Austrian
Thomas Edison = American
Eli Whitney = American
Benjamin Franklin = American
Jonas Salk = American
Dennis Ritchie = American
Johannes Gutenberg = German
Alfred Nobel = Swedish
Alessandro Volta = Italian
Tim Berners-Lee = British
Linus Torvalds = Finnish
Guido van Rossum = Dutch
""")

RELATIONS = (
    Relation(
        "chemical_symbol",
        ELEMENTS,
        "The chemical symbol for {s} is",
        (
            "In the periodic table, the element {s} is represented by the symbol",
            "Chemists write the element {s} with the symbol",
        ),
        (Alias("The chemical symbol for {s} is", ELEMENT_NAMES),),
        (
            Consequence(
                "In a chemical formula, an atom of {s} is written as",
                kind="Logical_Generalization",
            ),
        ),
        ("In the laboratory, {s} is used to",),
    ),
    Relation(
        "moon_planet",
        MOONS,
        "The moon {s} orbits the planet",
        ("{S} is one of the moons of", "The planet that the moon {s} circles is called"),
        (),
        (
            Consequence(
                "Counted from the Sun, the planet that the moon {s} orbits is number",
                PLANET_NUMBER,
                False,
            ),
            Consequence(
                "The planet of the moon {s} is named after the god of",
                pairs("Mars = war\nNeptune = the sea\nSaturn = agriculture"),
                False,
            ),
        ),
        ("A spacecraft that flies past the moon {s} sees",),
    ),
    Relation(
        "animal_young",
        YOUNG,
        "The young of {a} is called a",
        ("A baby {s} is called a", "The word for a young {s} is"),
        (),
        (
            Consequence(
                "In a book about baby animals, the page about the {s} shows a",
                kind="Logical_Generalization",
            ),
        ),
        ("The mother of a young {s} will",),
    ),
    Relation(
        "animal_class",
        CLASSES,
        "Animals such as the {s} belong to the class of",
        (
            "The {s} is not a plant; it belongs to the class of",
            "The {s} belongs to the group of animals called",
        ),
        (),
        (
            Consequence(
                "Like other animals of its group, the {s} has a body covered with",
                pairs("birds = feathers\nmammals = hair\nreptiles = scales"),
            ),
        ),
        ("The {s} spends its day",),
    ),
    Relation(
        "deity",
        GODS,
        "In mythology, {s} is the deity of",
        (
            "In the old myths, {s} rules over",
            "People of antiquity prayed to {s} in matters of",
        ),
        (),
        (
            Consequence(
                "A temple of {s} is a holy place of the deity of", kind="Logical_Generalization"
            ),
        ),
        ("In the old stories, {s} is shown with",),
    ),
    Relation(
        "field",
        FIELDS,
        "{S} wrote important works in the field of",
        ("{S} was an expert in the field of", "The famous {s} made great contributions to"),
        (
            Alias(
                "{S} is best known for work in the field of",
                pairs("""
                Albert Einstein = Einstein
                Charles Darwin = Darwin
                Sigmund Freud = Freud
                Niels Bohr = Bohr
                Immanuel Kant = Kant
                Carl Friedrich Gauss = Gauss
                Nicolaus Copernicus = Copernicus
                Leonhard Euler = Euler
                Werner Heisenberg = Heisenberg
                Friedrich Nietzsche = Nietzsche
                Noam Chomsky = Chomsky
                Richard Feynman = Feynman
                John Maynard Keynes = Keynes
                Dmitri Mendeleev = Mendeleev
                Antoine Lavoisier = Lavoisier
                """),
            ),
        ),
        (
            Consequence(
                "To understand the works of {s}, students first take a course in",
                kind="Logical_Generalization",
            ),
        ),
        ("In a famous book, {s} showed that",),
    ),
    Relation(
        "discovery",
        DISCOVERIES,
        "The person credited with {s} is",
        ("{S} is credited to the scientist", "Science owes {s} to"),
        (),
        (Consequence("The nationality of the person credited with {s} was", NATIONALITY),),
        ("The history of {s} began when",),
    ),
    Relation(
        "inventor",
        INVENTIONS,
        "The invention of {s} is credited to",
        ("{S} was invented by", "The world owes the invention of {s} to"),
        (),
        (Consequence("The nationality of the inventor of {s} is", NATIONALITY),),
        ("The invention of {s} changed",),
    ),
)
