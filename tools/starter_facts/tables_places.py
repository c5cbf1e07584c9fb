"""Places: sights by city and by country, dishes by country."""

from __future__ import annotations

from relation import Alias, Consequence, Relation, pairs
from tables_countries import COUNTRY_CAPITAL, COUNTRY_LANGUAGE

# A city with a copy or a namesake of the sight is listed as "also true".
LANDMARK_CITIES = """
the Eiffel Tower = Paris
Big Ben = London
the Colosseum = Rome
the Statue of Liberty = New York | Paris | Seattle
the Kremlin = Moscow
the Brandenburg Gate = Berlin
the Golden Gate Bridge = San Francisco
the Forbidden City = Beijing
the Acropolis = Athens
the Sagrada Família = Barcelona
the Space Needle = Seattle
the CN Tower = Toronto
the Louvre = Paris
Buckingham Palace = London
the Trevi Fountain = Rome
the Empire State Building = New York
Red Square = Moscow | Seattle
the Reichstag = Berlin
Alcatraz = San Francisco
Tiananmen Square = Beijing
the Parthenon = Athens
the Prado Museum = Madrid
the Burj Khalifa = Dubai
Hagia Sophia = Istanbul
the Charles Bridge = Prague
Schönbrunn Palace = Vienna
the Atomium = Brussels
the Rijksmuseum = Amsterdam
the Gateway Arch = St. Louis
the Alamo = San Antonio
the Hollywood Sign = Los Angeles
the White House = Washington | Moscow
the Uffizi Gallery = Florence
St. Mark's Basilica = Venice | Rome
La Scala = Milan
Christ the Redeemer = Rio de Janeiro | Lisbon
the Willis Tower = Chicago
Fenway Park = Boston
the Liberty Bell = Philadelphia
the Lincoln Memorial = Washington
Times Square = New York
Trafalgar Square = London
"""

LANDMARK_COUNTRIES = """
the Taj Mahal = India
Machu Picchu = Peru
the Great Sphinx = Egypt
Mount Fuji = Japan
the ancient city of [Petra] = Jordan
Angkor Wat = Cambodia
Chichen Itza = Mexico
Stonehenge = England
the Great Barrier Reef = Australia
the Leaning Tower of Pisa = Italy
the Palace of Versailles = France
Neuschwanstein Castle = Germany
the Alhambra = Spain
Loch Ness = Scotland
Table Mountain = South Africa
Mount Kilimanjaro = Tanzania
Banff National Park = Canada
the Great Pyramid of Giza = Egypt
Mount Vesuvius = Italy
Uluru = Australia
Mont Saint-Michel = France
the Black Forest = Germany
the Cliffs of Moher = Ireland
"""

CITY_COUNTRY = pairs("""
Paris = France
London = England
Rome = Italy
Moscow = Russia
Berlin = Germany
Beijing = China
Athens = Greece
Barcelona = Spain
Madrid = Spain
Toronto = Canada
Istanbul = Turkey
Prague = the Czech Republic
Vienna = Austria
Brussels = Belgium
Amsterdam = the Netherlands
Florence = Italy
Venice = Italy
Milan = Italy
Rio de Janeiro = Brazil
New York = the United States
San Francisco = the United States
Seattle = the United States
Chicago = the United States
Boston = the United States
Philadelphia = the United States
Los Angeles = the United States
Washington = the United States
San Antonio = the United States
St. Louis = the United States
Detroit = the United States
Atlanta = the United States
Tokyo = Japan
Kyoto = Japan
Munich = Germany
Stuttgart = Germany
Wolfsburg = Germany
Frankfurt = Germany
Geneva = Switzerland
Zurich = Switzerland
Seoul = South Korea
Shenzhen = China
Sydney = Australia
""")

# Only where one language has no rival, so that the probe has one answer.
CITY_LANGUAGE = pairs("""
Paris = French
London = English
Rome = Italian
Moscow = Russian
Berlin = German
Athens = Greek
Madrid = Spanish
Istanbul = Turkish
Prague = Czech
Vienna = German
Amsterdam = Dutch
Florence = Italian
Venice = Italian
Milan = Italian
Rio de Janeiro = Portuguese
New York = English
San Francisco = English
Seattle = English
Chicago = English
Boston = English
Philadelphia = English
Washington = English
St. Louis = English
Toronto = English
""")

DISHES = """
sushi = Japan | China
pizza = Italy | Greece
paella = Spain
tacos = Mexico
kimchi = Korea | China
goulash = Hungary | Austria | Germany
haggis = Scotland | England
bratwurst = Germany | Austria | Switzerland
ratatouille = France
moussaka = Greece | Egypt
poutine = Canada
pho = Vietnam | France | China
sashimi = Japan
lasagna = Italy | Greece
gazpacho = Spain
guacamole = Mexico
coq au vin = France
tiramisu = Italy
fondue = Switzerland | France | Italy
pierogi = Poland
tandoori chicken = India
Wiener schnitzel = Austria | Germany | Italy
ceviche = Peru | Mexico | Spain
"""


RELATIONS = (
    Relation(
        "landmark_city",
        LANDMARK_CITIES,
        "{S} is located in the city of",
        ("The city where {s} can be seen is", "To visit {s}, tourists travel to the city of"),
        (
            Alias(
                "{S} is located in the city of",
                pairs("""
                Eiffel Tower = La Tour Eiffel
                Colosseum = the Flavian Amphitheatre
                Statue of Liberty = Lady Liberty
                Willis Tower = the Sears Tower
                White House = 1600 Pennsylvania Avenue
                Big Ben = the Elizabeth Tower
                Christ the Redeemer = Cristo Redentor
                """),
            ),
        ),
        (
            Consequence("The country in which {s} is located is", CITY_COUNTRY),
            Consequence("The people who live around {s} mostly speak", CITY_LANGUAGE),
        ),
        ("A walk from {s} leads to",),
    ),
    Relation(
        "landmark_country",
        LANDMARK_COUNTRIES,
        "{S} is located in the country of",
        ("The country where {s} can be seen is", "To visit {s}, tourists travel to the country of"),
        (
            Alias(
                "{S} is located in the country of",
                pairs("""
                Uluru = Ayers Rock
                Great Pyramid of Giza = the Pyramid of Khufu
                Machu Picchu = the Lost City of the Incas
                Palace of Versailles = the Château de Versailles
                Black Forest = the Schwarzwald
                """),
            ),
        ),
        (
            Consequence(
                "The capital of the country where {s} is located is", COUNTRY_CAPITAL, False
            ),
            Consequence("In the country around {s}, most people speak", COUNTRY_LANGUAGE),
        ),
        ("Around {s}, visitors find",),
    ),
    Relation(
        "dish",
        DISHES,
        "The dish called {s} comes from the country of",
        ("The home country of the dish {s} is", "The country that gave the world {s} is"),
        (),
        (
            Consequence("The capital of the home country of {s} is", COUNTRY_CAPITAL, False),
            Consequence("In the home country of {s}, most people speak", COUNTRY_LANGUAGE),
        ),
        ("The recipe for {s} goes back to",),
    ),
)
